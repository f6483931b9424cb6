// Devices, who holds which layers, and how a model is loading.

import { bar, byId, bytes, count, make } from "./dom.js";

const COLOURS = 8;
const GOOD = new Set(["serving", "online"]);
const BAD = new Set(["failed", "stopped", "offline", "left", "lost", "incompatible"]);
const LOADING = new Set(["planning", "loading"]);

const badge = (state) =>
  make("span", { className: `badge ${GOOD.has(state) ? "good" : BAD.has(state) ? "bad" : "warn"}` }, state);

/** A colour for each device that stays the same while the household does. */
function colours(status) {
  const order = status.devices.map((device) => device.name);
  return (name) => `var(--d${Math.max(0, order.indexOf(name)) % COLOURS})`;
}

const stagesOf = (deployment) => deployment.plan?.stages ?? [];

const range = (stage) => (stage.first_layer === stage.last_layer ? `${stage.first_layer}` : `${stage.first_layer}–${stage.last_layer}`);

function layers(deployment, colour, away) {
  const stages = stagesOf(deployment);
  const total = Math.max(...stages.map((stage) => stage.last_layer)) + 1;
  const segments = stages.map((stage, index) => make("div", {
    className: away.has(stage.device) ? "gone" : "",
    title: `${stage.device}: layers ${range(stage)}, ${bytes(stage.memory_bytes)}`,
    vars: { "flex-grow": stage.last_layer - stage.first_layer + 1, "flex-basis": "0", "background-color": colour(stage.device), "--at": index / stages.length },
  }, range(stage)));
  const holders = stages.map((stage) => make("li", {},
    make("span", { className: "dot", vars: { "--device": colour(stage.device) } }),
    make("b", {}, stage.device),
    make("span", {}, `layers ${range(stage)} · ${bytes(stage.memory_bytes)}`)));
  return [
    make("div", { className: "layers", role: "img", "aria-label": `${total} layers over ${count(stages.length, "stage")}` }, ...segments),
    make("div", { className: "scale" }, make("span", {}, "embedding"), make("span", {}, "head")),
    make("ol", { className: "legend", role: "list" }, ...holders),
  ];
}

/** How weights are held, in the device's words; an option among them stays on one line. */
function weights(deployment) {
  if (!deployment.weights) return null;
  const parts = `weights: ${deployment.weights}`.split(/(--\w+ \w+)/);
  return make("p", { className: "figures" }, ...parts.map((part, index) => (index % 2 ? make("code", {}, part) : part)));
}

/** Which stages' hidden states are rounded on their way there. */
function rounded(deployment) {
  const forms = deployment.plan?.activations ?? [];
  const names = new Set(stagesOf(deployment).slice(1).filter((_, index) => forms[index] === "int8").map((stage) => stage.device));
  return names.size ? make("p", { className: "figures" }, `activations travel as int8 to ${[...names].join(", ")}`) : null;
}

function figures(deployment) {
  const found = [];
  const predicted = deployment.plan?.predicted?.tokens_per_second;
  const measured = deployment.measured?.tokens_per_second;
  if (predicted) found.push(`predicted ${predicted.toFixed(0)} tokens/s`);
  if (measured) found.push(`measured ${measured.toFixed(0)} tokens/s`);
  found.push(`epoch ${deployment.epoch}`, `coordinated by ${deployment.coordinator}`);
  return make("p", { className: "figures" }, found.join(" · "));
}

function card(deployment, status, colour, stop) {
  const away = new Set(status.devices.filter((device) => BAD.has(device.state)).map((device) => device.name));
  const mine = deployment.coordinator === status.device.name;
  return make("section", { className: "card" },
    make("div", { className: "row" }, make("h2", {}, deployment.model), badge(deployment.state)),
    deployment.reason ? make("p", { className: "reason" }, deployment.reason) : null,
    LOADING.has(deployment.state) ? bar(deployment.progress, "loading") : null,
    ...(stagesOf(deployment).length ? layers(deployment, colour, away) : []),
    weights(deployment),
    rounded(deployment),
    figures(deployment),
    mine && make("button", { className: "plain small", type: "button", onclick: () => stop(deployment.model) }, "Stop this model"));
}


function deviceItem(device, status, colour) {
  const taken = device.promised_bytes ?? 0;
  const away = BAD.has(device.state);
  const facts = [`${bytes(taken)} used of ${bytes(device.lent_bytes)} lent`];
  if (device.rtt_ms > 0 && !away) facts.push(`${device.rtt_ms.toFixed(1)} ms away`);
  const place = device.compute?.place;
  if (place && place !== "cpu") facts.push(`computes on ${place}`);
  if (device.engine && device.engine !== "running" && !away) facts.push(`engine ${device.engine}`);
  return make("li", { className: away ? "away" : "", vars: { "--device": colour(device.name) } },
    make("div", { className: "row" },
      make("span", { className: "dot" }),
      make("span", { className: "name" }, device.name),
      device.id === status.device.id && make("span", { className: "here" }, "this device"),
      badge(device.state)),
    bar(taken / device.lent_bytes, `${device.name}: ${facts[0]}`),
    make("p", { className: "quiet" }, facts.join(" · ")),
    device.problem ? make("p", { className: "reason" }, device.problem) : null);
}

/** Draws the whole household; `stop` is called with a model's name. */
export function draw(status, stop) {
  const colour = colours(status);
  byId("devices").replaceChildren(...status.devices.map((device) => deviceItem(device, status, colour)));
  const shown = status.deployments.filter((one) => one.state !== "stopped");
  byId("deployments").replaceChildren(...shown.map((one) => card(one, status, colour, stop)));
  byId("toggle-text").textContent = count(status.devices.length, "device");
  const nearby = (status.nearby ?? []).map((one) => one.name);
  byId("nearby").hidden = !nearby.length;
  byId("nearby").textContent = `Nearby, not paired: ${nearby.join(", ")}. Invite a device, and type the code there.`;
  byId("about").textContent = `peerllm ${status.version ?? ""}`;
}

/** Lets light run over the layers while an answer is being written. */
export function busy(writing) {
  for (const one of document.querySelectorAll(".layers")) one.classList.toggle("busy", writing);
}

/** How far a model's loading is, one bar per device. */
export function drawProgress(model, line) {
  const box = byId("progress");
  box.hidden = false;
  box.replaceChildren(make("div", { className: "card" },
    make("h2", {}, `Loading ${model}`),
    make("p", { className: "quiet" }, line.message || line.state || ""),
    ...Object.entries(line.devices ?? {}).map(([name, share]) =>
      make("div", {}, make("p", { className: "quiet" }, `${name}, ${Math.round(100 * share)} %`), bar(share, `${name} loaded`)))));
}

export function endProgress(error) {
  const box = byId("progress");
  box.hidden = !error;
  if (error) box.replaceChildren(make("div", { className: "card" }, make("p", { className: "error" }, error)));
}

/** The code for another device, big enough to read across a room. */
export function drawInvitation(invitation, address) {
  const box = byId("invitation");
  box.hidden = false;
  box.replaceChildren(make("div", { className: "card" },
    make("p", { className: "quiet" }, "On the other device, start peerllm and type:"),
    make("code", {}, `peerllm join ${invitation.code}`),
    make("span", { className: "code" }, invitation.code),
    make("p", { className: "quiet" }, `Valid for ${Math.round(invitation.expires_s / 60)} minutes, for one device. If it does not find this one, add `,
      make("code", {}, `--at ${address}:${invitation.port}`))));
}
