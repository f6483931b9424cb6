// The page: what is shown when, and what the buttons do.

import { get, lines, post } from "./api.js";
import { Conversation } from "./chat.js";
import { byId, make } from "./dom.js";
import { busy, draw, drawInvitation, drawProgress, endProgress } from "./household.js";

const BUILTIN = "builtin";
const EXAMPLES = [
  ["Turn on the light in the kitchen", "a smart-home command"],
  ["What is 27 + 15?", "a sum"],
  ["What are you?", "about itself"],
  ["Tell me a story about a fox", "a story"],
];

if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname);

const state = { status: null, models: [], running: false };
const conversation = new Conversation(update);
const field = byId("prompt");

function banner(text) {
  byId("banner").hidden = !text;
  byId("banner").textContent = text;
}

const chosen = () => state.models.find((model) => model.id === byId("model").value);

function reasonNotToSend() {
  const model = chosen();
  if (!state.status) return "Connecting to this device …";
  if (!model) return "";
  if (model.state !== "serving") return `${model.id} is ${model.state}${model.reason ? `: ${model.reason}` : ""}`;
  return "";
}

function update() {
  const writing = conversation.writing;
  const ready = chosen()?.state === "serving";
  byId("send").hidden = writing;
  byId("send").disabled = !ready || !field.value.trim();
  byId("stop").hidden = !writing;
  byId("new").disabled = !conversation.messages.length;
  field.placeholder = ready ? "Write a message" : chosen() ? "The model cannot answer now" : "No model is serving yet";
  busy(writing);
  const away = (state.status?.devices ?? []).filter((device) => ["offline", "lost"].includes(device.state)).map((device) => device.name);
  banner(reasonNotToSend() || (away.length ? `Not here now: ${away.join(", ")}` : ""));
  welcome(ready);
}

function drawModels() {
  const picker = byId("model");
  const before = picker.value;
  picker.replaceChildren(...state.models.map((model) => make("option", { value: model.id }, model.id)));
  if (state.models.some((model) => model.id === before)) picker.value = before;
  picker.parentElement.hidden = !state.models.length;
}

let welcomed = "";

function welcome(ready) {
  const box = byId("welcome");
  box.hidden = conversation.messages.length > 0;
  const elsewhere = (state.status?.deployments ?? []).filter((one) => one.state === "serving" && one.coordinator !== state.status.device.name);
  const kind = JSON.stringify([chosen()?.id, ready, state.running, !state.status, elsewhere.map((one) => [one.model, one.coordinator])]);
  if (kind === welcomed || !state.status) return;
  welcomed = kind;
  if (!chosen()) box.replaceChildren(...noModel(elsewhere));
  else if (chosen().id === BUILTIN) box.replaceChildren(...builtin(ready));
  else box.replaceChildren(make("h2", {}, "Ask your household"), make("p", {}, `${chosen().id} runs on the devices you see here. Nothing you write leaves them.`));
}

function noModel(elsewhere) {
  return [
    make("h2", {}, "No model runs on this device yet"),
    make("p", {}, "peerllm divides one model over the devices of your household. Start with the small built-in one, or run a larger one by its name."),
    elsewhere.length && make("p", {}, `To talk to ${elsewhere[0].model}, open the page of ${elsewhere[0].coordinator}: a model answers on the device it was started on.`),
    make("div", {}, make("button", { type: "button", disabled: state.running, onclick: () => run(BUILTIN) }, state.running ? "Starting …" : "Start the built-in model")),
  ].filter(Boolean);
}

function builtin(ready) {
  return [
    make("h2", {}, "A very small model, divided over your devices"),
    make("p", {}, "The built-in model is a demonstration. It was trained on generated dialogues only: smart-home commands, sums, questions about itself, stories. Its answers are often wrong. Load a larger model for real work."),
    make("div", { className: "examples" }, ...EXAMPLES.map(([text, what]) =>
      make("button", { type: "button", disabled: !ready, onclick: () => send(text) }, text, make("small", {}, what)))),
  ];
}

async function run(model) {
  if (state.running) return;
  state.running = true;
  update();
  let problem = "";
  try {
    drawProgress(model, { message: "asking the devices" });
    for await (const line of lines("/peerllm/v1/run", { model })) drawProgress(model, line);
    await refreshModels();
    byId("model").value = model;
  } catch (error) {
    problem = `${model} does not run: ${error.message}`;
  }
  endProgress(problem);
  state.running = false;
  update();
}

async function stop(model) {
  try {
    await post("/peerllm/v1/stop", { model });
  } catch (error) {
    endProgress(error.message);
  }
}

async function refreshModels() {
  state.models = (await get("/v1/models")).data;
  drawModels();
}

function send(text) {
  if (conversation.writing || chosen()?.state !== "serving" || !text.trim()) return;
  field.value = "";
  grow();
  conversation.ask(chosen().id, text.trim());
  field.focus();
}

function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  update();
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
byId("new").addEventListener("click", () => { conversation.clear(); update(); field.focus(); });
byId("model").addEventListener("change", update);
byId("toggle").addEventListener("click", () => toggle(!byId("household").classList.contains("open")));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") toggle(false); });
byId("run-form").addEventListener("submit", (event) => { event.preventDefault(); run(byId("run-model").value.trim()); });
byId("invite").addEventListener("click", async () => {
  try {
    drawInvitation(await post("/peerllm/v1/invite"), location.hostname === "127.0.0.1" ? "ADDRESS" : location.hostname);
  } catch (error) {
    endProgress(error.message);
  }
});

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
  update();
});
events.addEventListener("error", () => {
  state.status = null;
  banner("The connection to this device is lost. Trying again …");
});
field.focus();
