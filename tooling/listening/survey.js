"use strict";
// The survey in, a file of ratings out. Everything is on this page: nothing is ever fetched or sent.
const survey = JSON.parse(document.getElementById("survey").textContent);
const kept = "dit-trt-listening:" + survey.survey;
const element = (id) => document.getElementById(id);
const sound = element("sound");
const buttons = [...element("ratings").children];
const questions = new Map(survey.questions.map((question) => [question.id, question]));
let state = null; // {rater, begun, at, heard: [id], ratings: {id: 1..5}, saved}
let order = [];

// -------------------- the order of the questions: another for every rater, the same for one

function* randoms(text) {
  let seed = 2166136261; // FNV-1a of the text seeds mulberry32
  for (const byte of new TextEncoder().encode(text)) seed = Math.imul(seed ^ byte, 16777619);
  for (;;) {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    yield ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  }
}

function shuffled(ids, text) {
  const found = [...ids].sort();
  const random = randoms(text);
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor(random.next().value * (i + 1));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

// -------------------- what stays on the device

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(kept));
    return found && typeof found.rater === "string" && found.ratings && Array.isArray(found.heard) ? found : null;
  } catch {
    return null;
  }
}

function keep() {
  try {
    localStorage.setItem(kept, JSON.stringify(state));
  } catch {
    say("This browser does not keep answers on this device: save them as a file before you close the page.");
  }
}

function save() {
  state.saved = new Date().toISOString();
  keep();
  const answers = {
    format: "dit-trt-listening-answers", version: 1, survey: survey.survey, rater: state.rater,
    begun: state.begun, saved: state.saved, questions: order.length, order, ratings: state.ratings,
  };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(answers, null, 1)], { type: "application/json" }));
  const name = state.rater.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  link.download = `answers-${survey.survey.slice(0, 6)}-${name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  say(`Saved as ${link.download}`);
}

// -------------------- what is seen

const rated = () => Object.keys(state.ratings).length;
const say = (text) => { element("status").textContent = text; };

function show(view) {
  for (const name of ["intro", "question", "end"]) element(name).hidden = name !== view;
  element("footer").hidden = view !== "question";
  sound.pause();
}

function focusOn(heading) {
  heading.focus({ preventScroll: true });
  scrollTo(0, 0);
}

function showIntro() {
  show("intro");
  focusOn(element("intro").querySelector("h1"));
}

function go(at) {
  state.at = Math.min(Math.max(at, 0), order.length);
  keep();
  say("");
  if (state.at === order.length) return showEnd();
  const question = questions.get(order[state.at]);
  show("question");
  element("caption").textContent = question.caption;
  element("who").textContent = state.rater;
  element("time").value = 0;
  sound.src = "data:audio/flac;base64," + question.audio;
  update();
  focusOn(element("caption"));
}

function update() {
  const id = order[state.at];
  const heard = state.heard.includes(id);
  element("where").textContent = `Question ${state.at + 1} of ${order.length}, ${rated()} rated`;
  element("done").value = rated();
  element("heard").textContent = heard ? "Heard. Now rate it." : "Listen to the end, then rate it.";
  if (state.ratings[id]) element("heard").textContent = `Rated ${state.ratings[id]}.`;
  for (const button of buttons) {
    button.disabled = !heard;
    button.setAttribute("aria-pressed", String(state.ratings[id] === Number(button.value)));
  }
  element("back").disabled = state.at === 0;
}

function showEnd() {
  show("end");
  const left = order.length - rated();
  element("left").textContent = left
    ? `${rated()} of ${order.length} sounds are rated, ${left} ${left === 1 ? "is" : "are"} not yet.`
    : `All ${order.length} sounds are rated.`;
  element("unrated").hidden = left === 0;
  focusOn(element("end").querySelector("h1"));
}

// -------------------- what is done

function play() {
  if (!sound.paused) return sound.pause();
  say("");
  sound.play().catch((error) => {
    if (error.name !== "AbortError") say(`This browser cannot play the sound (${error.name}): please try another.`);
  });
}

function rate(value) {
  const id = order[state.at];
  if (!state.heard.includes(id)) return say("Listen to the sound to its end first.");
  state.ratings[id] = value;
  state.saved = null;
  keep();
  say("");
  update();
}

function begin(rater) {
  const random = () => "r-" + [...crypto.getRandomValues(new Uint8Array(5))].map((b) => b.toString(36)).join("");
  state = { rater: rater.trim() || random(), begun: new Date().toISOString(), at: 0, heard: [], ratings: {}, saved: null };
  resume();
}

function resume() {
  order = shuffled(questions.keys(), survey.survey + state.rater);
  go(state.at);
}

sound.addEventListener("timeupdate", () => { element("time").value = sound.currentTime / sound.duration || 0; });
sound.addEventListener("ended", () => {
  const id = order[state.at];
  if (!state.heard.includes(id)) state.heard.push(id);
  keep();
  update();
});
for (const kind of ["play", "pause", "ended"]) {
  sound.addEventListener(kind, () => {
    const playing = !sound.paused && !sound.ended;
    element("play-sign").textContent = playing ? "❚❚" : "▶";
    element("play-word").textContent = playing ? "Pause" : "Play";
  });
}
element("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(element("rater").value);
});
element("play").addEventListener("click", play);
element("ratings").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  rate(Number(button.value));
  if (event.detail) focusOn(element("caption")); // a pointer's click: Space is to play again
});
element("back").addEventListener("click", () => go(state.at - 1));
element("next").addEventListener("click", () => go(state.at + 1));
element("again").addEventListener("click", () => go(order.length - 1));
element("unrated").addEventListener("click", () => go(order.findIndex((id) => !state.ratings[id])));
element("another").addEventListener("click", () => {
  const last = state.saved ? "" : " They are not saved as a file yet.";
  if (!confirm(`The answers of ${state.rater} will be removed from this device.${last} Go on?`)) return;
  state = null;
  localStorage.removeItem(kept);
  element("rater").value = "";
  say("");
  showIntro();
});
for (const button of document.querySelectorAll(".save")) button.addEventListener("click", save);

document.addEventListener("keydown", (event) => {
  if (!state || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const asking = !element("question").hidden;
  const onButton = event.target.closest("button") !== null; // Space and Enter are its own
  if (asking && /^[1-5]$/.test(event.key)) rate(Number(event.key));
  else if (asking && event.key === " " && !onButton) play();
  else if (asking && (event.key === "ArrowRight" || (event.key === "Enter" && !onButton))) go(state.at + 1);
  else if (event.key === "ArrowLeft") go(state.at - 1);
  else return;
  event.preventDefault();
});

state = load();
if (state) resume();
else showIntro();
if (state) say("Welcome back: your answers were kept.");
