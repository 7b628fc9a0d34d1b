"""The page's script: values under the cursor, a legend that highlights, tables that sort. Without it nothing is missing
but these; it reads what is drawn and asks nobody for anything.

A plot with values has `data-x` and `data-y` ("low high kind title"), its lines `data-name`. What belongs to one series
has the same `data-s`, whose first letter is that of its kind, and so has its entry in a legend.
"""

from distill.reporting.plot import SPAN

ROWS = 24  # of the lines under the cursor that are told, the nearest ones
REACH = 28  # pixels from the cursor to a point

SCRIPT = (
    """
const all = (query, root = document) => [...root.querySelectorAll(query)];
const made = (name, kind, ...parts) => {
  const element = document.createElement(name); element.className = kind; element.append(...parts); return element; };
const buttonIn = place => place.appendChild(made('button', '', ...place.childNodes));
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

let pinned = null;
const light = name => all('[data-s]').forEach(mark =>
  mark.classList.toggle('dim', !!name && mark.dataset.s[0] === name[0] && mark.dataset.s !== name));
for (const entry of all('.legend [data-s]')) {
  const button = buttonIn(entry), name = entry.dataset.s;
  button.setAttribute('aria-pressed', false);
  for (const event of ['pointerenter', 'focus']) button.addEventListener(event, () => light(name));
  for (const event of ['pointerleave', 'blur']) button.addEventListener(event, () => light(pinned));
  button.addEventListener('click', () => {
    pinned = pinned === name ? null : name;
    all('.legend [data-s]').forEach(other =>
      other.firstChild.setAttribute('aria-pressed', other.dataset.s === pinned));
    light(pinned); });
}

const tip = document.body.appendChild(made('div', 'tip')), near = (a, b) => Math.abs(a - b);
const written = value => String(+value.toPrecision(4));
const axis = words => { const [low, high, kind, ...title] = words.split(' ');
  return {kind, title: title.join(' '), at: share => { const value = kind === 'log' ? low * (high / low) ** share :
    +low + share * (high - low); return kind === 'whole' ? Math.round(value) : value; }}; };
const points = line => line.places ??= [...line.getAttribute('d').matchAll(/[ML](-?\\d+) (-?\\d+)/g)].map(
  ([, x, y]) => [x / SPAN, 1 - y / SPAN]);
function underCursor(plot, lines, event) {
  const box = plot.getBoundingClientRect(), x = axis(plot.dataset.x), y = axis(plot.dataset.y);
  const across = (event.clientX - box.left) / box.width, up = 1 - (event.clientY - box.top) / box.height;
  const closest = line => points(line).reduce((a, b) => near(b[0], across) < near(a[0], across) ? b : a);
  const sorted = lines.map(line => [closest(line), line]).sort(([a], [b]) => near(a[1], up) - near(b[1], up));
  const [best, nearest] = sorted[0];
  const shown = sorted.slice(0, ROWS).sort(([a], [b]) => b[1] - a[1]).map(([place, line]) => made('p',
    line === nearest ? 'nearest' : '', made('span', '', line.dataset.name), made('b', '', written(y.at(place[1]))),
    near(place[0], best[0]) > .001 ? ` at ${written(x.at(place[0]))}` : ''));
  const more = lines.length > ROWS ? [made('p', '', `and ${lines.length - ROWS} more`)] : [];
  if (!pinned) light(lines.length > 1 && near(best[1], up) < .08 ? nearest.dataset.s : null);
  return [made('p', '', `${x.title} ${written(x.at(best[0]))}`), ...shown, ...more];
}
function underReach(dots, event) {
  const far = dot => { const b = dot.getBoundingClientRect(); return Math.hypot(event.clientX - (b.left + b.right) / 2,
    event.clientY - (b.top + b.bottom) / 2); };
  const best = dots.reduce((a, b) => far(b) < far(a) ? b : a);
  if (!pinned) light(far(best) > REACH ? null : best.dataset.s);
  return far(best) > REACH ? [] : [made('p', '', best.getAttribute('aria-label'))];
}
const hide = () => { tip.classList.remove('shown'); light(pinned); };
document.addEventListener('pointerdown', event => event.target.closest('svg.plot') || hide());
for (const plot of all('svg.plot[data-x]')) {
  const lines = [...all('path[data-name]', plot), ...all('use', plot).map(use => document.querySelector(
    use.getAttribute('href')))].filter(line => points(line).length);
  const dots = all('circle', plot).filter(dot => dot.firstChild);
  for (const dot of dots) { dot.setAttribute('aria-label', dot.textContent); dot.firstChild.remove(); }
  const show = event => {
    const told = [...(dots.length ? underReach(dots, event) : []),
      ...(lines.length ? underCursor(plot, lines, event) : [])];
    tip.replaceChildren(...told); tip.classList.toggle('shown', told.length > 0);
    const left = event.clientX + (event.clientX > innerWidth / 2 ? -16 - tip.offsetWidth : 16);
    tip.style.left = `${clamp(left, 4, Math.max(4, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${clamp(event.clientY + 14, 4, Math.max(4, innerHeight - tip.offsetHeight - 4))}px`; };
  for (const event of ['pointermove', 'pointerdown']) plot.addEventListener(event, show);
  plot.addEventListener('pointerleave', event => event.pointerType === 'touch' || hide());
}

const UNITS = {ms: 1e-3, min: 60, h: 3600, k: 1e3, kJ: 1e3, M: 1e6, G: 1e9};
const NUMBER = /([+-]?[\\d.,]*\\d(?:e[+-]?\\d+)?) ?([a-zA-Z]*)/g;
const size = text => { const parts = [...text.replace('+-', '').replaceAll(',', '').matchAll(NUMBER)];
  return parts.length ? parts.reduce((sum, [, number, unit]) => sum + number * (UNITS[unit] ?? 1), 0) : NaN; };
for (const table of all('table.sorts')) all('th', table).forEach((head, column) => {
  const rows = [...table.tBodies[0].rows], text = row => row.cells[column].textContent;
  if (head.textContent && rows.some(text)) buttonIn(head).addEventListener('click', () => {
    const way = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    all('th', table).forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', way === 1 ? 'ascending' : 'descending');
    const order = head.classList.contains('word') ?
      (a, b) => way * text(a).localeCompare(text(b), 'en', {numeric: true}) :
      (a, b) => isNaN(size(text(a))) - isNaN(size(text(b))) || way * (size(text(a)) - size(text(b)));
    table.tBodies[0].append(...rows.sort(order)); }); });
""".replace("SPAN", str(SPAN))
    .replace("ROWS", str(ROWS))
    .replace("REACH", str(REACH))
)
