// Devices, who holds which layers, and how a model is loading.

import { bar, byId, bytes, count, make, update } from "./dom.js";

const COLOURS = 8;
const GOOD = new Set(["serving", "online"]);
const BAD = new Set(["failed", "stopped", "offline", "left", "lost", "incompatible"]);
const LOADING = new Set(["planning", "loading"]);

const badge = (state) =>
  make("span", { className: `badge ${GOOD.has(state) ? "good" : BAD.has(state) ? "bad" : "warn"}` }, state);

/** A device's colour follows its id, so it is the same on every device's page; a colour that is taken makes way to the next. */
function colours(devices) {
  const found = new Map();
  const taken = new Set();
  for (const device of [...devices].sort((a, b) => (a.id < b.id ? -1 : 1))) {
    let place = Number.parseInt(device.id.slice(0, 8), 16) % COLOURS;
    while (taken.has(place) && taken.size < COLOURS) place = (place + 1) % COLOURS;
    taken.add(place);
    found.set(device.name, `var(--d${place})`);
  }
  return (name) => found.get(name) ?? "var(--soft)";
}

/** What people and clients call a deployment. */
export const nameOf = (deployment) => deployment.name || deployment.model;

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
  if (deployment.context) found.push(`context ${deployment.context.toLocaleString("en")} tokens`);
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
  const name = nameOf(deployment);
  const loading = LOADING.has(deployment.state);
  return make("section", { className: "card", key: deployment.id },
    make("div", { className: "row", key: "head" }, make("h2", { title: deployment.model }, name), badge(deployment.state)),
    deployment.reason ? make("p", { className: "reason", key: "reason" }, deployment.reason) : null,
    deployment.message ? make("p", { className: "quiet", key: "message" }, deployment.message) : null,
    loading ? bar(deployment.progress, `${name}, ${Math.round(100 * deployment.progress)} % done`) : null,
    ...(stagesOf(deployment).length ? layers(deployment, colour, away) : []),
    weights(deployment),
    rounded(deployment),
    figures(deployment),
    mine && make("button", { className: "plain small", type: "button", key: "stop", onclick: () => stop(name) }, "Stop this model"));
}

function deviceItem(device, status, colour) {
  const used = device.promised_bytes; // the engine's own size is not counted in what is lent
  const away = BAD.has(device.state);
  const leaving = away ? "" : device.leaving; // why it lends nothing now
  const facts = [`${bytes(used)} used of ${bytes(device.lent_bytes)} lent`];
  if (device.rtt_ms > 0 && !away) facts.push(`${device.rtt_ms.toFixed(1)} ms away`);
  const place = device.compute?.place;
  if (place && place !== "cpu") facts.push(`computes on ${place}`);
  if (device.engine && device.engine !== "running" && !away) facts.push(`engine ${device.engine}`);
  return make("li", { className: away ? "away" : "", key: device.id, vars: { "--device": colour(device.name) } },
    make("div", { className: "row" },
      make("span", { className: "dot" }),
      make("span", { className: "name" }, device.name),
      device.id === status.device.id && make("span", { className: "here" }, "this device"),
      badge(leaving ? (leaving.startsWith("paused") ? "paused" : "leaving") : device.state)),
    bar(used / device.lent_bytes, `${device.name}: ${facts[0]}`),
    make("p", { className: "quiet" }, facts.join(" · ")),
    leaving ? make("p", { className: "reason" }, leaving) : null,
    device.problem ? make("p", { className: "reason" }, device.problem) : null);
}

/** Draws the whole household; `stop` is called with a model's name. */
export function draw(status, stop) {
  const colour = colours(status.devices);
  update(byId("devices"), ...status.devices.map((device) => deviceItem(device, status, colour)));
  const shown = status.deployments.filter((one) => one.state !== "stopped");
  update(byId("deployments"), ...shown.map((one) => card(one, status, colour, stop)));
  byId("toggle-text").textContent = count(status.devices.length, "device");
  const nearby = (status.nearby ?? []).map((one) => one.name);
  byId("nearby").hidden = !nearby.length;
  byId("nearby").textContent = `Nearby, not paired: ${nearby.join(", ")}. Invite a device, and type the code there.`;
  byId("about").textContent = `peerllm ${status.version ?? ""}`;
}

/** What was asked of the device and goes on, or went wrong: a card for each; `dismiss` is called with its key. */
export function drawNotices(notices, dismiss) {
  const box = byId("notices");
  box.hidden = !notices.size;
  update(box, ...[...notices].map(([key, one]) => make("div", { className: "card", key },
    one.error ? make("p", { className: "error", role: "alert", key: "error" }, one.error) : make("h2", { key: "title" }, one.title),
    one.error ? null : make("p", { className: "quiet", key: "message" }, one.message || ""),
    ...Object.entries(one.devices ?? {}).map(([name, share]) => make("div", { key: `device ${name}` },
      make("p", { className: "quiet" }, `${name}, ${Math.round(100 * share)} %`), bar(share, `${name} loaded`))),
    one.error && make("button", { className: "plain small", type: "button", key: "dismiss", onclick: () => dismiss(key) }, "Dismiss"))));
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
