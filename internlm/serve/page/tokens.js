// A text whose tokens show their probability: by a tint, and with alternatives on hover and on focus.

import { make } from "./dom.js";

const LEVELS = [
  [0.5, "50 % and more"],
  [0.2, "20–50 %"],
  [0.05, "5–20 %"],
  [0.01, "1–5 %"],
  [0, "below 1 %"],
];

const level = (probability) => LEVELS.findIndex(([least]) => probability >= least);

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 9.95 ? `${value.toFixed(0)} %` : value >= 0.01 ? `${Number(value.toPrecision(2))} %` : "< 0.01 %";
}

/** Spaces and line ends that can be seen. */
const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

export function fillLegend(element) {
  const samples = LEVELS.map(([, name], index) => make("span", { class: `token level-${index}` }, name));
  element.replaceChildren("Probability of a token:", ...samples);
}

export class TokenText {
  /** Fills an element; `label` names it for screen readers. */
  constructor(element, label) {
    this.element = element;
    this.tokens = [];
    this.spans = [];
    this.text = "";
    this.waitingText = "";
    this.waitingTokens = [];
    element.replaceChildren();
    element.classList.remove("empty");
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", `${label}; arrow keys move over its tokens`);
    this.listeners = new AbortController();
    const options = { signal: this.listeners.signal };
    element.addEventListener("mouseover", (event) => this.#show(event.target), options);
    element.addEventListener("mouseout", hideCard, options);
    element.addEventListener("focusin", (event) => this.#show(event.target), options);
    element.addEventListener("focusout", hideCard, options);
    element.addEventListener("keydown", (event) => this.#move(event), options);
  }

  /** Lets another text use the element. */
  close() {
    this.listeners.abort();
    hideCard();
  }

  /** Adds a part of the text. Its tokens may come earlier than their characters, which can need several tokens. */
  push(text, tokens) {
    this.text += text;
    this.tokens.push(...tokens);
    this.waitingText += text;
    this.waitingTokens.push(...tokens);
    this.#match();
  }

  /** Shows what waits for further tokens. */
  end() {
    if (this.waitingText || this.waitingTokens.length) this.#add(this.waitingText, this.waitingTokens);
    this.waitingText = "";
    this.waitingTokens = [];
  }

  #match() {
    while (this.waitingTokens.length) {
      const [{ text }] = this.waitingTokens;
      const space = this.waitingText.match(/^\s*/)[0];
      const start = this.waitingText.startsWith(text) ? "" : space;
      if (!text || text.includes("\ufffd") || !this.waitingText.startsWith(start + text)) break;
      this.#add(start + text, [this.waitingTokens.shift()]);
      this.waitingText = this.waitingText.slice(start.length + text.length);
    }
    const isPartsOnly = this.waitingTokens.every((token) => token.text.includes("\ufffd"));
    if (this.waitingText && isPartsOnly) this.end();
  }

  #add(text, tokens) {
    const known = tokens.filter((token) => token.logprob != null);
    const own = make("span", {}, text);
    if (known.length) {
      const least = Math.min(...known.map((token) => Math.exp(token.logprob)));
      own.className = `token level-${level(least)}`;
      own.tabIndex = this.spans.length ? -1 : 0;
      own.tokens = tokens;
      this.spans.push(own);
    }
    this.element.append(own);
  }

  #show(target) {
    if (target.tokens) showCard(target);
  }

  #move(event) {
    const here = this.spans.indexOf(event.target);
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: this.spans.length - 1 }[event.key];
    if (here < 0 || next === undefined || !this.spans[next]) return;
    event.preventDefault();
    this.spans[here].tabIndex = -1;
    this.spans[next].tabIndex = 0;
    this.spans[next].focus();
  }
}

const card = () => document.getElementById("token-card");

function showCard(span) {
  const parts = span.tokens.map((token) => {
    const heading = make("p", { class: "chosen" }, make("code", {}, visible(token.text)));
    if (token.logprob == null) return heading;
    heading.append(` ${percent(token.logprob)}`);
    const rows = token.alternatives.map(([text, logprob]) => {
      const bar = make("div", { class: "bar" });
      bar.style.width = `${(5 * Math.exp(logprob)).toFixed(2)}rem`;
      const isChosen = text === token.text;
      return make(
        "tr",
        { class: isChosen ? "chosen" : null },
        make("td", {}, make("code", {}, visible(text))),
        make("td", { class: "number" }, percent(logprob)),
        make("td", {}, bar),
      );
    });
    return make("div", {}, heading, make("table", {}, make("tbody", {}, ...rows)));
  });
  card().replaceChildren(...parts);
  card().hidden = false;
  span.setAttribute("aria-describedby", "token-card");
  const place = span.getBoundingClientRect();
  const own = card().getBoundingClientRect();
  const isBelow = place.bottom + own.height + 12 < innerHeight;
  card().style.top = `${Math.max(isBelow ? place.bottom + 6 : place.top - own.height - 6, 4)}px`;
  card().style.left = `${Math.max(Math.min(place.left, innerWidth - own.width - 8), 4)}px`;
}

export function hideCard() {
  card().hidden = true;
  document.querySelector("[aria-describedby='token-card']")?.removeAttribute("aria-describedby");
}
