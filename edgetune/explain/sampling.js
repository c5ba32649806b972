// What sampling settings leave of a distribution, in llama.cpp's order: top-k, top-p, min-p, then the temperature.
// Knows nothing of the page. `steps` are [natural logarithm of a probability, tokens that have it], likeliest first.
'use strict';
// The first tokens of the steps, at most `limit` of them, one step after the other: logarithm and how many.
function* upTo(steps, limit) {
  for (const [log, count] of steps) {
    const part = Math.min(count, limit);
    if (part <= 0) return;
    yield [log, part];
    limit -= part;
  }
}

// How many of the likeliest tokens the settings {temp, top_k, top_p, min_p} keep.
const kept = (steps, set) => {
  if (set.temp <= 0) return 1;
  let left = steps.reduce((sum, [, count]) => sum + count, 0);
  if (set.top_k > 0) left = Math.min(left, set.top_k);
  if (set.top_p < 1) {
    let all = 0, sum = 0, seen = 0;
    for (const [log, count] of upTo(steps, left)) all += count * Math.exp(log);
    for (const [log, count] of upTo(steps, left)) {
      const one = Math.exp(log) / all;
      if (sum + count * one >= set.top_p - 1e-12) { seen += Math.max(1, Math.ceil((set.top_p - sum) / one - 1e-9)); break; }
      sum += count * one; seen += count;
    }
    left = Math.max(1, Math.min(left, seen));
  }
  if (set.min_p > 0) {
    let seen = 0;
    for (const [log, count] of steps) { if (log < steps[0][0] + Math.log(set.min_p) - 1e-9) break; seen += count; }
    left = Math.max(1, Math.min(left, seen));
  }
  return left;
};

// What is left, and what the model gave it; the new probabilities of the first `named` tokens, and the `rest` together.
const sampled = (steps, named, set) => {
  const left = kept(steps, set), heat = set.temp > 0 ? set.temp : 1, weights = [];
  let total = 0, own = 0, rest = 0;
  for (const [log, count] of upTo(steps, left)) {
    const weight = count * Math.exp((log - steps[0][0]) / heat);
    if (weights.length < named) weights.push(weight); else rest += weight;
    total += weight; own += count * Math.exp(log);
  }
  return {left, own, weights: weights.map(weight => weight / total), rest: rest / total};
};
