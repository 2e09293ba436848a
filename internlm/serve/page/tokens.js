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

  /** Adds the tokens whose characters are known; parts of a character belong to the text in front of the next token. */
  #match() {
    while (this.waitingTokens.length) {
      const number = this.waitingTokens.findIndex(({ text }) => text && !isPart(text));
      if (number < 0) break;
      const { text } = this.waitingTokens[number];
      // Some tokenizers drop the space in front of the first word.
      const own = this.waitingText.includes(text) ? text : text.replace(/^ (?=.)/, "");
      const start = number ? this.waitingText.indexOf(own, 1) : this.waitingText.startsWith(own) ? 0 : -1;
      if (start < 0) break;
      const length = number ? start : own.length;
      this.#add(this.waitingText.slice(0, length), this.waitingTokens.splice(0, number || 1));
      this.waitingText = this.waitingText.slice(length);
    }
    const isPartsOnly = this.waitingTokens.every((token) => isPart(token.text));
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

/** Whether a token is parts of a character, which completions spell like "bytes:\xf0\x9f". */
const isPart = (text) => text.includes("\ufffd") || /^bytes:.*\\x[0-9a-f]{2}/.test(text);

const card = () => document.getElementById("token-card");

/** The likeliest tokens in the place of a token, with itself. */
function alternatives(token) {
  if (token.logprob == null) return make("p", {}, make("code", {}, visible(token.text)));
  const others = token.alternatives.filter(([text]) => text !== token.text);
  const all = [[token.text, token.logprob], ...others].sort((one, other) => other[1] - one[1]);
  const rows = all.map(([text, logprob]) => {
    const bar = make("div", { class: "bar" });
    bar.style.width = `${(5 * Math.exp(logprob)).toFixed(2)}rem`;
    return make(
      "tr",
      { class: text === token.text ? "chosen" : null },
      make("td", {}, make("code", {}, visible(text))),
      make("td", { class: "number" }, percent(logprob)),
      make("td", {}, bar),
    );
  });
  return make("table", {}, make("tbody", {}, ...rows));
}

function showCard(span) {
  const parts = span.tokens.map(alternatives);
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
