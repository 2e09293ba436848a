// The actions of a step on the ranks of a pipeline, drawn on a canvas that mouse and arrow keys read.

import { color, make } from "./dom.js";

const ROW = 30;
const MARGIN = 74;
const LARGEST = 16000;
const COLORS = { F: "forward", B: "backward", I: "backward-input", W: "backward-weight" };

export function makeTimeline(timeline) {
  const caption = make("p", { class: "caption", "aria-live": "polite" }, "Point at an action, or use the arrow keys.");
  const canvas = make("canvas", { tabindex: 0, role: "img", "aria-label": `Timeline of a step: ${title(timeline)}` });
  const zoom = make("select", {}, ...[1, 2, 4, 8, 16].map((factor) => make("option", { value: factor }, `${factor}×`)));
  const scroll = make("div", { class: "scroll" }, canvas);
  const kinds = Object.keys(timeline.kinds).filter((kind) => timeline.rows.some((row) => row.actions.some((each) => each[2] === kind)));
  const legend = kinds.map((kind) => {
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = `var(--${COLORS[kind]})`;
    return make("span", {}, swatch, timeline.kinds[kind]);
  });
  const drawing = new Drawing(timeline, canvas, caption);
  const draw = () => drawing.draw(scroll.clientWidth * Number(zoom.value));
  zoom.addEventListener("change", draw);
  new ResizeObserver(draw).observe(scroll);
  document.addEventListener("theme-changed", draw);
  return make(
    "div",
    { class: "timeline" },
    make("p", {}, title(timeline)),
    make("p", { class: "legend" }, ...legend, make("label", { class: "check" }, "Zoom ", zoom)),
    scroll,
    caption,
  );
}

function title({ name, num_ranks, num_micro_batches, bubble }) {
  return `${name}, ${num_ranks} pipeline rank(s), ${num_micro_batches} micro-batch(es), ${(100 * bubble).toFixed(1)} % bubble`;
}

class Drawing {
  constructor(timeline, canvas, caption) {
    Object.assign(this, { timeline, canvas, caption, row: 0, index: -1 });
    canvas.addEventListener("mousemove", (event) => this.#point(event));
    canvas.addEventListener("keydown", (event) => this.#move(event));
  }

  draw(width) {
    const { rows, end } = this.timeline;
    this.width = Math.min(width, LARGEST);
    if (this.width <= MARGIN) return;
    this.unit = (this.width - MARGIN - 8) / end;
    const height = rows.length * ROW + 10;
    const ratio = Math.min(devicePixelRatio, LARGEST / this.width);
    Object.assign(this.canvas, { width: this.width * ratio, height: height * ratio });
    Object.assign(this.canvas.style, { width: `${this.width}px`, height: `${height}px` });
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const colors = Object.fromEntries(Object.entries(COLORS).map(([kind, name]) => [kind, color(name)]));
    const [text, onAction] = [color("text"), color("on-accent")];
    rows.forEach(({ rank, actions }, number) => {
      const top = number * ROW + 5;
      pen.fillStyle = text;
      pen.fillText(`rank ${rank}`, 8, top + ROW / 2);
      for (const [start, stop, kind, microBatch, chunk] of actions) {
        const [left, size] = [MARGIN + start * this.unit, (stop - start) * this.unit];
        pen.globalAlpha = 1 - (0.45 * chunk) / this.timeline.num_chunks;
        pen.fillStyle = colors[kind];
        pen.fillRect(left, top + 2, Math.max(size - 1, 0.5), ROW - 4);
        pen.globalAlpha = 1;
        if (size > 9 + 7 * String(microBatch).length) {
          pen.fillStyle = onAction;
          pen.fillText(microBatch, left + 4, top + ROW / 2);
        }
      }
    });
    this.#frame(pen);
  }

  /** Marks the action that is read. */
  #frame(pen) {
    const action = this.timeline.rows[this.row].actions[this.index];
    if (!action) return;
    pen.strokeStyle = color("text");
    pen.lineWidth = 2;
    pen.strokeRect(MARGIN + action[0] * this.unit, this.row * ROW + 7, (action[1] - action[0]) * this.unit - 1, ROW - 4);
  }

  #read(row, index) {
    const { rank, actions, bubble, peak_live } = this.timeline.rows[row];
    const action = actions[index];
    [this.row, this.index] = [row, index];
    this.draw(this.width);
    const [start, stop, kind, microBatch, chunk] = action;
    const part = this.timeline.num_chunks > 1 ? `, chunk ${chunk}` : "";
    this.caption.textContent =
      `rank ${rank}: ${this.timeline.kinds[kind]} of micro-batch ${microBatch}${part}, time ${start} to ${stop}; ` +
      `${(100 * bubble).toFixed(1)} % bubble, at most ${peak_live} live micro-batches on this rank`;
  }

  #point(event) {
    const row = Math.floor((event.offsetY - 5) / ROW);
    const time = (event.offsetX - MARGIN) / this.unit;
    const index = this.timeline.rows[row]?.actions.findIndex(([start, stop]) => start <= time && time < stop) ?? -1;
    if (index >= 0 && (row !== this.row || index !== this.index)) this.#read(row, index);
  }

  #move(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.max(Math.min(this.row + step[0], this.timeline.rows.length - 1), 0);
    const last = this.timeline.rows[row].actions.length - 1;
    this.#read(row, Math.max(Math.min(this.index + step[1], last), 0));
  }
}
