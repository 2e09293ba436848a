// One curve of a run: a chart with the spread of each bucket, a smoothed line, and a caption for mouse and keyboard.

import { color, make, short } from "./dom.js";
import uPlot from "./vendor/uplot/uPlot.esm.js";

const HEIGHT = 210;
/** Distances of ticks: there is no half step. */
const WHOLE = Array.from({ length: 16 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

/** Exponential smoothing without the bias of its start; gaps stay gaps. */
function smooth(values, weight) {
  let [sum, total] = [0, 0];
  return values.map((value) => {
    if (value == null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

export class Chart {
  constructor(name) {
    this.name = name;
    this.value = make("span", { class: "value" });
    this.caption = make("div", { class: "caption", "aria-live": "polite" });
    this.plot = make("div");
    this.element = make(
      "figure",
      { class: "chart", tabindex: 0, onkeydown: (event) => this.#move(event), onblur: () => this.#showNotes() },
      make("figcaption", {}, make("span", { class: "name" }, name), this.value),
      this.plot,
      this.caption,
    );
    this.resizing = new ResizeObserver(() => this.uplot?.setSize({ width: this.plot.clientWidth, height: HEIGHT }));
    this.resizing.observe(this.plot);
  }

  /**
   * Shows points.
   *
   * `points` has mean and, for buckets of several steps, low and high; `options` has isLog, smoothing and axis;
   * `newest` is a step and a number; `nonfinite` counts the numbers that are in no bucket.
   */
  show(xs, points, { options, newest, nonfinite }) {
    const isBelowLog = (value) => options.isLog && value != null && value <= 0;
    const drawn = (values) => values.map((value) => (isBelowLog(value) ? null : value));
    const mean = drawn(points.mean);
    this.notes = [];
    const below = points.mean.filter(isBelowLog).length;
    if (below) this.notes.push(`${below} points at or below 0 have no logarithm`);
    const counts = Object.entries(nonfinite ?? {});
    if (counts.length) this.notes.push(`not finite: ${counts.map(([kind, count]) => `${count} × ${kind}`).join(", ")}`);
    if (options.note) this.notes.push(options.note);
    this.value.textContent = newest ? short(newest[1]) : "";
    this.element.setAttribute("aria-label", `${this.name}, ${short(newest?.[1])} at step ${newest?.[0]}; arrow keys read it`);

    const known = mean.filter((value) => value != null).length;
    const isSparse = known < xs.length / 2;
    const form = JSON.stringify([options.isLog, options.smoothing > 0, isSparse, options.axis, document.documentElement.dataset.theme]);
    this.axis = options.axis;
    const data = [xs, mean, drawn(points.low ?? mean), drawn(points.high ?? mean), smooth(mean, options.smoothing)];
    if (this.form === form) {
      this.uplot.setData(data, !this.isZoomed);
      if (this.isZoomed) this.uplot.redraw();
    } else {
      this.uplot?.destroy();
      this.form = form;
      this.isZoomed = false;
      this.uplot = new uPlot(this.#options(options, isSparse), data, this.plot);
    }
    if (this.uplot.cursor.idx == null) this.#showNotes();
  }

  /** Draws it anew, as for another theme. */
  forget() {
    this.form = null;
  }

  close() {
    this.resizing.disconnect();
    this.uplot?.destroy();
    this.element.remove();
  }

  #options({ isLog, smoothing, axis }, isSparse) {
    const [accent, muted, line] = [color("accent"), color("muted"), color("line")];
    const pale = (share) => accent.replace(/^rgb\((.*)\)$/, `rgba($1, ${share})`);
    const lines = { spanGaps: isSparse, points: { show: isSparse, size: 4, fill: accent, stroke: accent } };
    const scale = { stroke: muted, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const hidden = { show: true, stroke: "transparent", points: { show: false }, spanGaps: isSparse };
    return {
      width: this.plot.clientWidth || 400,
      height: HEIGHT,
      legend: { show: false },
      padding: [10, 18, 0, 0],
      cursor: { sync: { key: "run" }, y: false, points: { size: 6 }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: isLog ? { distr: 3 } : { range: padded } },
      axes: [
        { ...scale, size: 28, incrs: WHOLE, values: (_, splits) => splits.map((value) => wide(value, axis)) },
        { ...scale, size: 58, values: (_, splits) => splits.map((value) => (value == null ? "" : short(value))) },
      ],
      series: [
        {},
        { ...lines, stroke: smoothing > 0 ? pale(0.3) : accent, width: smoothing > 0 ? 1 : 1.5 },
        hidden,
        hidden,
        { ...lines, show: smoothing > 0, stroke: accent, width: 2 },
      ],
      bands: [{ series: [3, 2], fill: pale(0.16) }],
      hooks: {
        setCursor: [() => this.#read()],
        setSelect: [(uplot) => { this.isZoomed ||= uplot.select.width > 0; }],
        ready: [(uplot) => uplot.over.addEventListener("dblclick", () => { this.isZoomed = false; })],
      },
    };
  }

  #read() {
    const index = this.uplot?.cursor.idx;
    if (index == null) {
      this.#showNotes();
      return;
    }
    const [xs, mean, low, high, smoothed] = this.uplot.data.map((values) => values[index]);
    const spread = low === high ? "" : ` (${short(low)} to ${short(high)})`;
    const line = this.uplot.series[4].show && mean != null ? `, smoothed ${short(smoothed)}` : "";
    this.caption.textContent = `${this.axis} ${xs.toLocaleString("en")}: ${short(mean)}${spread}${line}`;
  }

  #showNotes() {
    this.caption.textContent = this.notes?.join("; ") ?? "";
  }

  #move(event) {
    const length = this.uplot?.data[0].length ?? 0;
    const here = this.uplot?.cursor.idx ?? length;
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: length - 1 }[event.key];
    if (next === undefined || !length) return;
    event.preventDefault();
    const index = Math.max(Math.min(next, length - 1), 0);
    const left = this.uplot.valToPos(this.uplot.data[0][index], "x");
    this.uplot.setCursor({ left, top: HEIGHT / 3 });
  }
}

/** A range with some room, also for a curve that is constant. */
function padded(_, low, high) {
  if (low == null) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}

function wide(value, axis) {
  if (axis !== "tokens") return short(value);
  const unit = [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]].find(([, size]) => value >= size);
  return unit ? `${short(value / unit[1])} ${unit[0]}` : short(value);
}
