// Brings attention, positions and the choice of a token to life. Needs no network, and of other files only sampling.js.
const told = box => JSON.parse(box.querySelector('script').textContent);
const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};
const percent = share => {
  const value = 100 * share;
  return value >= 99.5 ? value.toFixed(0) + ' %' : value === 0 ? '0 %' : value < 0.01 ? '<0.01 %'
    : (value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toPrecision(2)) + ' %';
};
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const unpack = async text => {
  const bytes = Uint8Array.from(atob(text), sign => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};
const redraws = [];
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => redraws.forEach(draw => draw()));

// Attention: one head large with its tokens beside it, all heads of the block small, and a row as shaded text.
const attention = async box => {
  const maps = told(box), mean = await unpack(maps.mean), each = maps.each ? await unpack(maps.each) : mean;
  const [layer, head] = box.querySelectorAll('select'), output = box.querySelector('output');
  const large = box.querySelector('.map'), small = box.querySelector('.heads'), text = box.querySelector('.reads');
  let looking = maps.rows - 1;
  // Of a causal text the numbers up to the diagonal are there, row by row.
  const area = maps.causal ? maps.rows * (maps.rows + 1) / 2 : maps.rows * maps.columns;
  const at = (of, row, column) => {
    if (maps.causal && column > row) return 0;
    const place = maps.causal ? row * (row + 1) / 2 + column : row * maps.columns + column;
    return of < 0 || !maps.each ? (mean[+layer.value * area + place] / 255) ** 2
      : (each[(+layer.value * maps.heads + of) * area + place] / maps.levels) ** 2;
  };
  // A row is as dark as its own largest share lets it be, so that long texts show something too.
  const paint = (canvas, of, size, left = 0, top = 0, right = 0) => {
    const scale = devicePixelRatio || 1, pen = canvas.getContext('2d');
    const width = left + maps.columns * size + right, height = top + maps.rows * size;
    canvas.width = width * scale; canvas.height = height * scale;
    canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
    pen.scale(scale, scale);
    const mark = ink('--mark');
    for (let row = 0; row < maps.rows; row++) {
      const shares = Array.from({length: maps.columns}, (_, column) => at(of, row, column)), most = Math.max(...shares, 0.01);
      shares.forEach((share, column) => {
        pen.fillStyle = `rgba(${mark},${Math.sqrt(share / most)})`;
        pen.fillRect(left + column * size, top + row * size, size, size);
      });
    }
    return pen;
  };
  const size = Math.max(2, Math.min(26, Math.floor(560 / Math.max(maps.columns, maps.rows))));
  const named = size >= 12, left = named ? 96 : 0, top = named ? 84 : 0, right = named ? 48 : 0;
  const cut = piece => [...piece].slice(0, 11).join('') + ([...piece].length > 11 ? '…' : '');
  const draw = () => {
    const pen = paint(large, +head.value, size, left, top, right);
    pen.strokeStyle = `rgb(${ink('--warm')})`; pen.lineWidth = 1.5;
    pen.strokeRect(left + 0.75, top + looking * size + 0.75, maps.columns * size - 1.5, size - 1.5);
    if (named) {
      pen.fillStyle = ink('--ink'); pen.font = '12px ui-monospace, monospace'; pen.textBaseline = 'middle';
      pen.textAlign = 'right';
      maps.from.forEach((piece, row) => pen.fillText(cut(piece), left - 6, top + (row + 0.5) * size));
      pen.textAlign = 'left';
      maps.to.forEach((piece, column) => {
        pen.save(); pen.translate(left + (column + 0.5) * size, top - 5); pen.rotate(-Math.PI / 3);
        pen.fillText(cut(piece), 0, 0); pen.restore();
      });
    }
    if (maps.heads > 1) [...small.children].forEach((figure, of) => {
      figure.classList.toggle('on', of === +head.value);
      paint(figure.firstChild, of, Math.max(1, Math.min(8, Math.floor(90 / maps.columns))));
      figure.firstChild.style.height = 'auto';
    });
    const shares = Array.from({length: maps.columns}, (_, column) => at(+head.value, looking, column));
    const most = Math.max(...shares, 0.01);
    text.replaceChildren(element('p', {className: 'dim', textContent: `${maps.from[looking]} (token ${looking}) looks at:`}),
      ...shares.map((share, column) => {
        const chip = element('span', {className: 't'}, element('bdi', {textContent: maps.to[column]}), element('small', {textContent: percent(share)}));
        chip.style.background = `rgba(${ink('--mark')},${0.55 * share / most})`;
        if (box.hasAttribute('data-same')) chip.onclick = () => { looking = column; draw(); };
        if (column === looking && box.hasAttribute('data-same')) chip.classList.add('here');
        return chip;
      }));
  };
  if (maps.heads > 1) for (let of = 0; of < maps.heads; of++) {
    const figure = element('button', {type: 'button', title: `head ${of}`}, element('canvas'), element('small', {textContent: of}));
    figure.onclick = () => { head.value = of; draw(); };
    small.append(figure);
  }
  const cell = event => {
    const area = large.getBoundingClientRect();
    const column = Math.floor((event.clientX - area.left - left) / size), row = Math.floor((event.clientY - area.top - top) / size);
    return row >= 0 && row < maps.rows && column >= 0 && column < maps.columns ? [row, column] : null;
  };
  large.onmousemove = event => {
    const found = cell(event);
    if (found) output.textContent = `${maps.from[found[0]]} looks at ${maps.to[found[1]]}: ${percent(at(+head.value, ...found))}`;
  };
  large.onclick = event => { const found = cell(event); if (found) { looking = found[0]; draw(); } };
  layer.onchange = head.onchange = draw;
  redraws.push(draw); draw();
};

// Positions: every pair of numbers as a hand that turns at its own speed.
const positions = box => {
  const {pairs, wavelengths} = told(box), slider = box.querySelector('input'), output = box.querySelector('output');
  const dials = box.querySelector('.dials');
  pairs.forEach((pair, index) => {
    dials.insertAdjacentHTML('beforeend', '<svg viewBox="-22 -22 44 58"><circle r=20 /><line y2="-17"/><text y=33></text></svg>');
    dials.lastChild.querySelector('text').textContent = `pair ${pair}`;
  });
  const draw = () => {
    output.textContent = slider.value;
    [...dials.children].forEach((dial, index) => dial.querySelector('line').setAttribute('transform', `rotate(${360 * slider.value / wavelengths[index]})`));
  };
  slider.oninput = draw; draw();
};

// The choice of a token, under settings that can be moved.
const sampling = box => {
  const {pieces, shares, tail, typical} = told(box), sliders = [...box.querySelectorAll('input')];
  const given = sliders.map(slider => slider.value), [asGiven, once, often] = box.querySelectorAll('button');
  const said = box.querySelector('p output'), body = box.querySelector('tbody'), shown = 20;
  const steps = [...shares.map(share => [Math.log(Math.max(share, 1e-30)), 1]), ...tail];
  let drawn = new Map(), weights = [], rest = 0;
  const draw = () => {
    const set = Object.fromEntries(sliders.map(slider => [slider.dataset.set, +slider.value]));
    sliders.forEach(slider => { slider.nextSibling.textContent = slider.dataset.set === 'top_k' && +slider.value === 0 ? 'off' : slider.value; });
    let left, own;
    ({left, own, weights, rest} = sampled(steps, shares.length, set));
    body.replaceChildren(...shares.slice(0, shown).map((share, index) => {
      const after = weights[index] || 0, count = drawn.get(index) || 0;
      const bar = (part, kind) => { const made = element('span', {className: 'b' + kind}); made.style.width = `${8 * part}rem`; return made; };
      const row = element('tr', {className: after ? '' : 'cut'}, element('td', {className: 'm'}, element('bdi', {textContent: pieces[index]})),
        element('td', {}, bar(share, '')), element('td', {className: 'n', textContent: percent(share)}),
        element('td', {}, bar(after, ' w')), element('td', {className: 'n', textContent: percent(after)}),
        element('td', {className: 'n', textContent: count ? `drawn ${count} ×` : ''}));
      return row;
    }));
    const others = (drawn.get(-1) || 0) + [...drawn].reduce((sum, [index, count]) => sum + (index >= shown ? count : 0), 0);
    said.textContent = `${left.toLocaleString('en')} ${left === 1 ? 'token is' : 'tokens are'} left; the model gives them ${percent(own)}.`
      + (others ? ` Drawn from further down: ${others} ×.` : '') + (typical < 1 ? ' (--typical is not among these sliders.)' : '');
  };
  const take = times => {
    for (let time = 0; time < times; time++) {
      let at = Math.random(), index = 0;
      while (index < weights.length && at >= weights[index]) at -= weights[index++];
      if (index >= weights.length) index = rest > 0 ? -1 : weights.length - 1;
      drawn.set(index, (drawn.get(index) || 0) + 1);
    }
    draw();
  };
  sliders.forEach(slider => { slider.oninput = () => { drawn = new Map(); draw(); }; });
  asGiven.onclick = () => { sliders.forEach((slider, index) => { slider.value = given[index]; }); drawn = new Map(); draw(); };
  once.onclick = () => take(1); often.onclick = () => take(100);
  draw();
};

document.documentElement.classList.add('alive');
document.querySelectorAll('[data-maps]').forEach(attention);
document.querySelectorAll('[data-rope]').forEach(positions);
document.querySelectorAll('[data-sampler]').forEach(sampling);
// Canvases keep the colours they were painted with: paper has its own.
const paper = isPaper => {
  document.documentElement.classList.toggle('paper', isPaper);
  redraws.forEach(draw => draw());
};
addEventListener('beforeprint', () => { paper(true); document.querySelectorAll('details').forEach(one => { one.open = true; }); });
addEventListener('afterprint', () => paper(false));
