"use strict";
// Text that a run or a model wrote reaches the page as text alone: nothing here makes HTML of strings, but for
// whole pages of this server's own, read by DOMParser, in which scripts do not run.
const EVERY_S = 3, FIGURES_S = 10;
const there = name => document.getElementById(name);  // asked for anew: renew may replace it

async function part(name) {
  const address = new URL(location.href);
  address.searchParams.set("part", name);
  const answer = await fetch(address, {credentials: "same-origin"});
  if (!answer.ok) throw new Error(answer.statusText);
  return new DOMParser().parseFromString(await answer.text(), "text/html").getElementById(name);
}

// Pictures that are there keep their place until the new one is loaded; what is open stays open.
function renew(old, fresh) {
  const same = old.childElementCount === fresh.childElementCount &&
    [...old.children].every((one, i) => one.tagName === fresh.children[i].tagName && one.id === fresh.children[i].id);
  if (old.tagName === "IMG" || old.tagName === "SOURCE") {
    old.closest("figure").classList.remove("absent");  // what is hidden would never be loaded
    for (const name of ["src", "srcset"]) {
      const value = fresh.getAttribute(name);
      if (value !== null && value !== old.getAttribute(name)) old.setAttribute(name, value);
    }
  } else if (old.tagName === "INPUT") {
    return;
  } else if (same && old.childElementCount && !loose(old) && !loose(fresh)) {
    [...old.children].forEach((one, i) => renew(one, fresh.children[i]));
  } else if (old.isEqualNode(fresh)) {
    return;
  } else {
    old.replaceWith(document.importNode(fresh, true));
  }
}
function loose(node) {
  return [...node.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.data.trim());
}

let last = Date.now(), failed = 0;
async function follow() {
  if (document.hidden) return;
  try {
    if (there("live")) {
      const fresh = await part("live");
      renew(there("live"), fresh);
    }
    if (there("figures") && Date.now() - last > FIGURES_S * 1000) {
      last = Date.now();
      const fresh = await part("figures"), figures = there("figures");
      if (fresh && fresh.dataset.version !== figures.dataset.version) {
        figures.dataset.version = fresh.dataset.version;
        renew(figures, fresh);
      }
    }
    failed = 0;
  } catch (error) {
    failed += 1;
  }
  document.body.classList.toggle("lost", failed > 1);
}
if (there("live") || there("figures")) setInterval(follow, EVERY_S * 1000);

// A plot for which a run has no data yet.
addEventListener("error", event => {
  if (event.target instanceof HTMLImageElement) event.target.closest("figure")?.classList.add("absent");
}, true);
addEventListener("load", event => {
  if (event.target instanceof HTMLImageElement) event.target.closest("figure")?.classList.remove("absent");
}, true);

// --- rollouts ------------------------------------------------------------------------------------

const tip = document.getElementById("tip");
const read = new WeakMap();
function figuresOf(tokens) {
  if (!read.has(tokens)) read.set(tokens, JSON.parse(tokens.dataset.figures));
  return read.get(tokens);
}
function number(value) {
  return value === null || value === undefined ? "–" : Number(value.toPrecision(3)).toString();
}
function tell(token) {
  const known = figuresOf(token.closest(".tokens")), at = Number(token.dataset.i);
  const names = {advantages: "advantage", values: "value", logprobs: "log-prob"};
  const lines = [`token ${at + 1}: ${JSON.stringify(token.textContent)}`];
  for (const [key, name] of Object.entries(names)) if (known[key]) lines.push(`${name} ${number(known[key][at])}`);
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(Math.max(8, box.left), innerWidth - width - 8);
  const above = box.top - height - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
}
addEventListener("pointerover", event => {
  const token = event.target.closest?.(".t");
  if (token) tell(token); else if (event.pointerType !== "touch") tip.hidden = true;
});
addEventListener("pointerdown", event => {
  const token = event.target.closest?.(".t");
  if (token) tell(token); else tip.hidden = true;
});
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("change", event => {
  const tinted = event.target.closest?.(".tint") && event.target.closest(".tinted");
  if (tinted) tinted.dataset.tint = event.target.value;
});

// A chip leads to what the critic said there, which is folded away.
function unfold() {
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  if (!wanted) return;
  const folds = wanted.closest("details");
  if (folds) folds.open = true;
  wanted.scrollIntoView({block: "nearest"});
}
addEventListener("hashchange", unfold);
unfold();
