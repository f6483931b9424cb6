// The page: what is shown when, and what the buttons do.

import { get, lines, post } from "./api.js";
import { Conversation } from "./chat.js";
import { byId, make, update } from "./dom.js";
import { draw, drawInvitation, drawNotices } from "./household.js";

const BUILTIN = "builtin";
const ANSWERING = new Set(["planning", "loading", "serving"]); // a question asked earlier waits for the model
const EXAMPLES = [
  ["Turn on the light in the kitchen", "a smart-home command"],
  ["What is 27 + 15?", "a sum"],
  ["What are you?", "about itself"],
  ["Tell me a story about a fox", "a story"],
];

if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname);

const state = { status: null, models: [] };
const notices = new Map(); // by model or by what failed: { title, message, devices } or { error }
const conversation = new Conversation(refresh);
const field = byId("prompt");

function banner(text) {
  byId("banner").hidden = !text;
  byId("banner").textContent = text;
}

const chosen = () => state.models.find((model) => model.id === byId("model").value);

const ready = () => ANSWERING.has(chosen()?.state);

function whatToKnow() {
  const model = chosen();
  if (!state.status) return "Connecting to this device …";
  if (!model || model.state === "serving") return "";
  const detail = model.reason || model.message;
  const is = detail.startsWith(model.state) ? "" : `${model.state}${detail && ": "}`; // "is waiting for mini-pc to come back"
  return `${model.id} is ${is}${detail}${ready() ? ". You can ask now; the answer comes when it serves." : ""}`;
}

function refresh() {
  const writing = conversation.writing;
  byId("send").hidden = writing;
  byId("send").disabled = !ready() || !field.value.trim();
  byId("stop").hidden = !writing;
  byId("new").disabled = !conversation.messages.length;
  field.placeholder = ready() ? "Write a message" : chosen() ? "The model cannot answer now" : "No model is serving yet";
  document.body.classList.toggle("busy", writing && !conversation.held); // light runs over the layers
  const away = (state.status?.devices ?? []).filter((device) => ["offline", "lost"].includes(device.state)).map((device) => device.name);
  banner(whatToKnow() || (away.length ? `Not here now: ${away.join(", ")}` : ""));
  if (state.status) welcome();
}

function drawModels() {
  const picker = byId("model");
  const before = picker.value;
  update(picker, ...state.models.map((model) => make("option", { value: model.id, key: model.id }, model.id)));
  if (state.models.some((model) => model.id === before)) picker.value = before;
  picker.parentElement.hidden = !state.models.length;
}

function welcome() {
  const box = byId("welcome");
  box.hidden = conversation.messages.length > 0;
  const model = chosen();
  if (!model) update(box, ...noModel());
  else if (model.model === BUILTIN) update(box, ...builtin());
  else update(box, make("h2", {}, "Ask your household"), make("p", {}, `${model.id} runs on the devices you see here. Nothing you write leaves them.`));
}

function noModel() {
  const starting = isStarting(BUILTIN);
  return [
    make("h2", {}, "No model runs in this household yet"),
    make("p", {}, "peerllm divides one model over the devices of your household. Start with the small built-in one, or run a larger one by its name."),
    make("div", { key: "start" }, make("button", { type: "button", disabled: starting, onclick: () => run(BUILTIN) }, starting ? "Starting …" : "Start the built-in model")),
  ];
}

function builtin() {
  return [
    make("h2", {}, "A very small model, divided over your devices"),
    make("p", {}, "The built-in model is a demonstration. It was trained on generated dialogues only: smart-home commands, sums, questions about itself, stories. Its answers are often wrong. Load a larger model for real work."),
    make("div", { className: "examples" }, ...EXAMPLES.map(([text, what]) =>
      make("button", { type: "button", disabled: !ready(), onclick: () => send(text) }, text, make("small", {}, what)))),
  ];
}

function notice(key, value) {
  if (value) notices.set(key, value);
  else notices.delete(key);
  drawNotices(notices, (one) => notice(one, null));
  refresh();
}

const isStarting = (model) => notices.has(model) && !notices.get(model).error;

async function run(model) {
  if (isStarting(model)) {
    notice(model, { ...notices.get(model), title: `${model} is being started already` });
    return;
  }
  notice(model, { title: `Starting ${model}`, message: "asking the devices" });
  try {
    let name = model;
    for await (const line of lines("/peerllm/v1/run", { model })) {
      if (line.ok) name = line.name ?? model;
      else notice(model, { title: notices.get(model).title, ...line });
    }
    await refreshModels();
    byId("model").value = name;
    notice(model, null);
  } catch (error) {
    notice(model, { error: `${model} does not run: ${error.message}` });
  }
}

/** Does it, and shows why it could not be done. */
async function attempt(what, work) {
  try {
    await work();
    notice(what, null);
  } catch (error) {
    notice(what, { error: error.message });
  }
}

const stop = (model) => attempt(`stop ${model}`, () => post("/peerllm/v1/stop", { model }));

async function refreshModels() {
  state.models = (await get("/v1/models")).data.filter((one) => one.state !== "idle");
  drawModels();
}

function send(text) {
  if (conversation.writing || !ready() || !text.trim()) return;
  field.value = "";
  grow();
  conversation.ask(chosen().id, text.trim());
  field.focus();
}

function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  refresh();
}

function toggle(open) {
  byId("household").classList.toggle("open", open);
  byId("toggle").setAttribute("aria-expanded", String(open));
}

field.addEventListener("input", grow);
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(field.value);
  }
});
byId("form").addEventListener("submit", (event) => { event.preventDefault(); send(field.value); });
byId("stop").addEventListener("click", () => conversation.stop());
byId("new").addEventListener("click", () => { conversation.clear(); refresh(); field.focus(); });
byId("model").addEventListener("change", refresh);
byId("toggle").addEventListener("click", () => toggle(!byId("household").classList.contains("open")));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") toggle(false); });
byId("run-form").addEventListener("submit", (event) => { event.preventDefault(); run(byId("run-model").value.trim()); });
byId("invite").addEventListener("click", () => attempt("invite", async () =>
  drawInvitation(await post("/peerllm/v1/invite"), location.hostname === "127.0.0.1" ? "ADDRESS" : location.hostname)));

const events = new EventSource("/peerllm/v1/events");
events.addEventListener("message", async (event) => {
  state.status = JSON.parse(event.data);
  draw(state.status, stop);
  try {
    await refreshModels();
  } catch (error) {
    banner(error.message);
    return;
  }
  refresh();
});
events.addEventListener("error", () => {
  state.status = null;
  banner("The connection to this device is lost. Trying again …");
});
field.focus();
