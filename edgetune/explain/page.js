// Draws the attention maps: a row is a token that looks, a column one that is looked at.
'use strict';
for (const box of document.querySelectorAll('[data-maps]')) {
  const maps = JSON.parse(box.querySelector('script').textContent), bytes = Uint8Array.from(atob(maps.bytes), c => c.charCodeAt(0));
  const [layer, head] = box.querySelectorAll('select'), canvas = box.querySelector('canvas'), told = box.querySelector('output');
  const at = (row, column) => bytes[((+layer.value * maps.heads + +head.value) * maps.rows + row) * maps.columns + column];
  const ink = getComputedStyle(document.documentElement).getPropertyValue('--mark');
  const draw = () => {
    canvas.width = maps.columns; canvas.height = maps.rows;
    const pen = canvas.getContext('2d');
    for (let row = 0; row < maps.rows; row++) for (let column = 0; column < maps.columns; column++) {
      pen.fillStyle = `rgba(${ink},${Math.sqrt(at(row, column) / 255)})`; pen.fillRect(column, row, 1, 1);
    }
    const size = Math.max(4, Math.min(28, Math.floor(640 / maps.columns)));
    canvas.style.width = maps.columns * size + 'px'; canvas.style.height = maps.rows * size + 'px';
  };
  canvas.onmousemove = event => {
    const area = canvas.getBoundingClientRect();
    const column = Math.min(maps.columns - 1, Math.floor((event.clientX - area.left) / area.width * maps.columns));
    const row = Math.min(maps.rows - 1, Math.floor((event.clientY - area.top) / area.height * maps.rows));
    told.textContent = `${maps.from[row]} looks at ${maps.to[column]}: ${Math.round(at(row, column) / 2.55)} %`;
  };
  layer.onchange = head.onchange = draw; draw();
}
