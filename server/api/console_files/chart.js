// A line chart over the last minutes, drawn as SVG. Its legend tells the latest values as text, a table all of them.

import {el, say} from "./dom.js";
import {time} from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 132;
const MARGIN = {top: 8, right: 8, bottom: 18, left: 46};
const LINES = 3;
const TABLE_ROWS = 20;

// `spec`: title, unit, format, series [{name, of}] where `of` picks a value out of the figures, and maybe `most`, the
// highest value of the axis, and its number of `lines`. `window_s`: how far back it reads.
export class Chart {
  constructor(spec, window_s) {
    this.spec = spec;
    this.window_s = window_s;
    this.history = [];
    this.chosen = null;
    this.svg = svg("svg", {role: "img", tabindex: "0"});
    this.values = spec.series.map(() => el("span", {class: "value"}, "–"));
    this.when = el("span", {class: "when"});
    this.rows = el("tbody");
    this.details = el("details", {}, el("summary", {}, "As a table"), this.tableOf());
    this.details.addEventListener("toggle", () => this.drawTable());
    this.node = el("figure", {class: "card chart"},
      el("figcaption", {}, el("h3", {}, spec.title), el("span", {class: "unit"}, spec.unit), this.when),
      this.svg, this.legend(), this.details);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  show(history) {
    this.history = history;
    this.draw();
    if (this.details.open) this.drawTable();
  }

  legend() {
    const entries = this.spec.series.map((series, i) =>
      el("li", {}, el("span", {class: `swatch s${i + 1}`, "aria-hidden": "true"}), `${series.name} `, this.values[i]));
    return el("ul", {class: "legend"}, ...entries);
  }

  tableOf() {
    const heads = ["Time", ...this.spec.series.map((series) => series.name)];
    return el("div", {class: "scroll"}, el("table", {}, el("caption", {class: "hidden-text"}, this.spec.title),
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {scope: "col"}, head)))), this.rows));
  }

  listen() {
    const leave = () => this.choose(null);
    this.svg.addEventListener("pointermove", (event) => this.choose(this.nearest(event.offsetX)));
    this.svg.addEventListener("pointerleave", leave);
    this.svg.addEventListener("blur", leave);
    this.svg.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!step || !this.history.length) return;
      event.preventDefault();
      const last = this.history.length - 1;
      const from = this.chosen ? this.history.indexOf(this.chosen) : last + (step < 0 ? 1 : 0);
      this.choose(this.history[Math.max(0, Math.min(last, from + step))]);
    });
  }

  choose(point) {
    this.chosen = point;
    this.draw();
  }

  nearest(x) {
    if (!this.history.length) return null;
    const distance = (point) => Math.abs(this.x(point.at) - x);
    return this.history.reduce((best, point) => (distance(point) < distance(best) ? point : best));
  }

  x(at) {
    const share = 1 - (this.now - at) / this.window_s;
    return MARGIN.left + share * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    return MARGIN.top + (1 - value / this.top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  draw() {
    this.width = this.svg.clientWidth;
    if (!this.width) return;
    const last = this.history[this.history.length - 1];
    this.now = last ? last.at : 0;
    const chosen = this.chosen && this.history.includes(this.chosen) ? this.chosen : null;
    const values = this.spec.series.flatMap((series) => this.history.map(series.of)).filter((v) => v !== null);
    this.top = this.spec.most ?? niceTop(Math.max(...values, this.spec.least ?? 0));
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren(...this.grid(), ...this.spec.series.flatMap((series, i) => this.line(series, i)),
      ...(chosen ? this.cross(chosen) : []));
    this.tell(chosen ?? last, Boolean(chosen));
  }

  tell(point, isChosen) {
    const {format, series, title} = this.spec;
    const shown = series.map((one) => (point ? format(one.of(point)) : "–"));
    shown.forEach((text, i) => say(this.values[i], text));
    say(this.when, isChosen ? time(point.at) : "");
    this.svg.setAttribute("aria-label", `${title}, ${this.spec.unit}. ${isChosen ? time(point.at) : "Now"}: ` +
      `${series.map((one, i) => `${one.name} ${shown[i]}`).join(", ")}. Left and right arrow keys read earlier values.`);
  }

  grid() {
    const right = this.width - MARGIN.right;
    const drawn = [];
    const lines = this.spec.lines ?? LINES;
    for (let i = 0; i <= lines; i += 1) {
      const value = (this.top * i) / lines;
      const y = Math.round(this.y(value)) + 0.5;
      drawn.push(svg("line", {class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y}),
        text(MARGIN.left - 6, y + 3.5, "end", this.spec.axis(value)));
    }
    const minutes = Math.round(this.window_s / 60);
    drawn.push(text(MARGIN.left, HEIGHT - 4, "start", `${minutes} min ago`), text(right, HEIGHT - 4, "end", "now"));
    return drawn;
  }

  // The runs of neighbours that have a value: where nothing was measured, or nobody looked, the line is broken.
  runs(series) {
    const runs = [];
    let before = null;
    for (const point of this.history) {
      const value = series.of(point);
      if (value === null) before = null;
      else if (before !== null && point.at - before < this.window_s / 30) runs[runs.length - 1].push([this.x(point.at), this.y(value)]);
      else runs.push([[this.x(point.at), this.y(value)]]);
      if (value !== null) before = point.at;
    }
    return runs.map((run) => run.filter(([x]) => x >= MARGIN.left));
  }

  line(series, i) {
    const floor = this.y(0);
    return this.runs(series).filter((run) => run.length).flatMap((run) => {
      if (run.length === 1) return [svg("circle", {class: `dot s${i + 1}`, cx: round(run[0][0]), cy: round(run[0][1]), r: 2})];
      const path = run.map(([x, y]) => `${round(x)},${round(y)}`).join("L");
      const area = `M${round(run[0][0])},${floor}L${path}L${round(run[run.length - 1][0])},${floor}Z`;
      return [svg("path", {class: `area s${i + 1}`, d: area}), svg("path", {class: `line s${i + 1}`, d: `M${path}`})];
    });
  }

  cross(point) {
    const x = round(this.x(point.at));
    const dots = this.spec.series.map((series, i) => [series.of(point), i]).filter(([value]) => value !== null);
    return [svg("line", {class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom}),
      ...dots.map(([value, i]) => svg("circle", {class: `dot s${i + 1}`, cx: x, cy: round(this.y(value)), r: 3.5}))];
  }

  drawTable() {
    const stride = Math.max(1, Math.ceil(this.history.length / TABLE_ROWS));
    const points = this.history.filter((_, i) => (this.history.length - 1 - i) % stride === 0).reverse();
    this.rows.replaceChildren(...points.map((point) => el("tr", {}, el("th", {scope: "row"}, time(point.at)),
      ...this.spec.series.map((series) => el("td", {class: "number"}, this.spec.format(series.of(point)))))));
  }
}

const round = (n) => Math.round(n * 10) / 10;

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function text(x, y, anchor, words) {
  const node = svg("text", {x, y, "text-anchor": anchor});
  node.textContent = words;
  return node;
}

// The next of 3, 6, 9, 15, 30, ... times a power of ten: each gives whole thirds.
function niceTop(value) {
  if (!(value > 0)) return LINES;
  const power = 10 ** Math.floor(Math.log10(value / LINES));
  const step = [1, 2, 3, 5, 10].find((n) => n * power * LINES >= value * 1.02) ?? 20;
  return step * power * LINES;
}
