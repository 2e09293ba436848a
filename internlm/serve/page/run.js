// The curves of a run, live: the page asks for what was appended, and the server has read no more than that.

import { getJson } from "./api.js";
import { Chart } from "./chart.js";
import { make, makeTable, preferences, short } from "./dom.js";
import { openLayout } from "./layout.js";

const SECONDS = 2;
const TOKENS = "num_consumed_tokens";
const FAVORITES = ["loss", "grad_norm", "lr", "tgs"];

/** What is shown at first: the usual names, and the losses of validation sets. */
function usual(names) {
  const losses = names.filter((name) => /^val\/[^/]*_loss$/.test(name)).slice(0, 2);
  const found = [...FAVORITES.filter((name) => names.includes(name)), ...losses];
  return found.length ? found : names.slice(0, 4);
}

/** A time in one unit. */
function roughly(seconds) {
  for (const [unit, length] of [["days", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.round(seconds)} s`;
}

export function open(panel, { run }) {
  const find = (selector) => panel.querySelector(selector);
  if (run === null) {
    const reason = "This server shows no run. Start it with --run DIR, or see a run without a model: internlm view DIR";
    panel.replaceChildren(make("p", { class: "notice" }, reason));
    return;
  }
  find("h2").textContent = run;
  new LiveRun(find).start();
  openLayout(find(".layout"));
}

class LiveRun {
  constructor(find) {
    this.find = find;
    this.charts = new Map();
    this.chosen = preferences.get("curves", null);
    this.forget();
    this.isPaused = false;
  }

  start() {
    const [axis, log, smoothing] = ["axis", "log", "smoothing"].map((name) => this.find(`[name=${name}]`));
    axis.append(make("option", {}, "step"), make("option", {}, "tokens"));
    axis.value = preferences.get("axis", "step");
    log.checked = preferences.get("log", false);
    smoothing.value = preferences.get("smoothing", 0);
    const changed = () => {
      this.find("output").textContent = smoothing.value;
      preferences.set("axis", axis.value);
      preferences.set("log", log.checked);
      preferences.set("smoothing", Number(smoothing.value));
      this.options = { axis: axis.value, isLog: log.checked, smoothing: Number(smoothing.value) };
      this.draw();
    };
    for (const input of [axis, log, smoothing]) input.addEventListener("input", changed);
    changed();
    this.find("[type=search]").addEventListener("input", () => this.filterNames());
    this.find(".picker").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.find(".picker").open = false;
      this.find(".picker summary").focus();
    });
    this.find(".pause").addEventListener("click", () => {
      this.isPaused = !this.isPaused;
      this.find(".pause").textContent = this.isPaused ? "Go on" : "Pause";
      this.showStatus();
      this.poll();
    });
    document.addEventListener("theme-changed", () => {
      for (const chart of this.charts.values()) chart.forget();
      this.draw();
    });
    document.addEventListener("visibilitychange", () => this.poll());
    document.addEventListener("pane-shown", () => this.poll());
  }

  forget() {
    this.numForgotten = (this.numForgotten ?? 0) + 1;
    this.version = null;
    this.steps = [];
    this.curves = {};
  }

  /** Asks for news now and then again, while somebody can see them. */
  async poll() {
    clearTimeout(this.timer);
    if (this.isPaused || document.hidden || this.find("h2").closest("[hidden]") || this.isAsking) return;
    this.isAsking = true;
    let wait = SECONDS;
    try {
      wait = (await this.update()) ? SECONDS : 0;
    } catch (error) {
      this.failure = error.message;
      wait = 2 * SECONDS;
    }
    this.isAsking = false;
    this.showStatus();
    this.timer = setTimeout(() => this.poll(), 1000 * wait);
  }

  /** Takes over what is new; returns whether that is all. */
  async update() {
    const names = [...new Set([...(this.chosen ?? FAVORITES), TOKENS])];
    const asked = new URLSearchParams(names.map((name) => ["name", name]));
    if (this.version !== null) {
      asked.append("version", this.version);
      asked.append("start", Math.max(this.steps.length - 1, 0));
    }
    const numForgotten = this.numForgotten;
    const news = await getJson(`/run/curves?${asked}`);
    if (numForgotten !== this.numForgotten) return false; // Other curves were chosen since it was asked for.
    this.failure = null;
    this.take(news);
    this.news = news;
    // Names that were chosen for another run may be unknown in this one.
    const isFirst = !this.names?.length && news.names.length > 0 && !this.chosen?.some((name) => news.names.includes(name));
    if (isFirst) {
      this.chosen = usual(news.names);
      this.forget();
    }
    this.showNotices(news.notices);
    this.showNames(news.names);
    this.showNewest();
    this.draw();
    return news.is_complete && !isFirst;
  }

  take(news) {
    const kept = news.version === this.version ? news.first : 0;
    const join = (old, added) => [...(old ?? []).slice(0, kept), ...added];
    this.steps = join(this.steps, news.steps);
    this.curves = Object.fromEntries(
      Object.entries(news.curves).map(([name, points]) => [
        name,
        Object.fromEntries(Object.entries(points).map(([kind, values]) => {
          const before = this.curves[name]?.[kind] ?? Array(kept).fill(null);
          return [kind, join(before, values)];
        })),
      ]),
    );
    this.version = news.version;
  }

  draw() {
    if (!this.news) return;
    const tokens = this.curves[TOKENS]?.mean ?? [];
    const byTokens = this.options.axis === "tokens";
    const xs = byTokens ? this.steps.map((step, index) => (step === 0 ? 0 : tokens[index])) : this.steps;
    const isKnown = xs.map((x) => x != null);
    const pick = (values) => (byTokens ? values.filter((_, index) => isKnown[index]) : values);
    const missing = isKnown.filter((known) => !known).length;
    const note = missing ? `${missing} points have no number of tokens` : null;
    for (const [name, chart] of this.charts) {
      if (this.chosen?.includes(name) && this.curves[name]) continue;
      chart.close();
      this.charts.delete(name);
    }
    for (const name of this.chosen ?? []) {
      const points = this.curves[name];
      if (!points) continue;
      if (!this.charts.has(name)) {
        const chart = new Chart(name);
        this.charts.set(name, chart);
        this.find(".charts").append(chart.element);
      }
      const shown = Object.fromEntries(Object.entries(points).map(([kind, values]) => [kind, pick(values)]));
      this.charts.get(name).show(pick(xs), shown, {
        options: { ...this.options, note },
        newest: this.news.newest[name],
        nonfinite: this.news.nonfinite[name],
      });
    }
  }

  showStatus() {
    const parts = [];
    if (this.news?.last_step != null) parts.push(`step ${this.news.last_step.toLocaleString("en")}`);
    if (this.news?.width > 1) parts.push(`each point is ${this.news.width.toLocaleString("en")} steps`);
    if (this.failure) parts.push(this.failure);
    else if (this.isPaused) parts.push("paused");
    else if (this.news && !this.news.is_complete) parts.push("reading");
    else if (this.news?.age != null) parts.push(`written ${roughly(this.news.age)} ago`);
    this.find(".status").textContent = parts.join(" · ");
    this.find(".status").classList.toggle("error", Boolean(this.failure));
  }

  showNotices(notices) {
    if (String(notices) === String(this.notices)) return;
    this.notices = notices;
    this.find(".notices").replaceChildren(...notices.map((text) => make("li", {}, text)));
  }

  showNames(names) {
    if (String(names) === String(this.names)) return;
    this.names = names;
    const boxes = names.map((name) => {
      const choose = (event) => {
        const others = this.chosen.filter((each) => each !== name);
        this.chosen = event.target.checked ? [...others, name] : others;
        preferences.set("curves", this.chosen);
        this.forget();
        this.poll();
      };
      const box = make("input", { type: "checkbox", checked: this.chosen?.includes(name), onchange: choose });
      return make("label", { class: "check" }, box, name);
    });
    this.find(".names").replaceChildren(...boxes);
    this.filterNames();
  }

  filterNames() {
    const text = this.find("[type=search]").value.toLowerCase();
    for (const label of this.find(".names").children) label.hidden = !label.textContent.toLowerCase().includes(text);
  }

  showNewest() {
    if (!this.find(".newest").open) {
      this.find(".newest").ontoggle ??= () => this.showNewest();
      return;
    }
    const { newest, texts, names } = this.news;
    const rows = names.map((name) => [name, short(newest[name][1]), short(newest[name][0])]);
    rows.push(...Object.entries(texts).map(([name, text]) => [name, text, ""]));
    this.find(".newest .scroll").replaceChildren(makeTable([["name", "number", "step"], ...rows], (column) => column === 2));
  }
}
