// The conversation: kept in this page only, gone when it closes.

import { chat } from "./api.js";
import { byId, count, make } from "./dom.js";

const BURST_MS = 50; // tokens that come closer together than this tell nothing of the pace between them
const NEAR_END_PX = 80; // closer than this to the end, the view follows the answer

export class Conversation {
  /** `changed` is called when an answer begins, waits, goes on and ends. */
  constructor(changed) {
    this.log = byId("log");
    this.changed = changed;
    this.messages = [];
    this.abort = null;
    this.held = ""; // what the answer that is being written waits for
  }

  get writing() { return this.abort !== null; }

  clear() {
    this.stop();
    this.messages = [];
    for (const message of this.log.querySelectorAll(".message")) message.remove();
  }

  stop() { this.abort?.abort(); }

  #show(role, ...children) {
    const message = make("div", { className: `message ${role}` }, ...children);
    this.log.append(message);
    this.#follow(true);
    return message;
  }

  #follow(always = false) {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    if (always || scrollHeight - scrollTop - clientHeight < NEAR_END_PX) this.log.scrollTop = scrollHeight;
  }

  /** Asks `model`; the answer appears as it comes. */
  async ask(model, prompt) {
    const abort = new AbortController();
    const mine = this.messages;
    this.abort = abort;
    this.held = "";
    mine.push({ role: "user", content: prompt });
    this.#show("user", prompt);
    const text = document.createTextNode("");
    const waiting = make("span", { className: "waiting" }, "thinking …");
    const stats = make("span", { className: "stats" });
    const message = this.#show("assistant", make("span", { className: "who" }, model), make("span", { className: "text" }, text), waiting, stats);
    message.classList.add("writing");
    this.log.setAttribute("aria-busy", "true");
    this.changed();
    const wait = (words) => { // "": it goes on
      waiting.textContent = words ? `${words} …` : text.data || pending ? "" : "thinking …";
      message.classList.toggle("held", Boolean(words));
      if (this.held === words || this.abort !== abort) return;
      this.held = words;
      this.#follow();
      this.changed();
    };
    const clock = new Clock();
    let ending = "";
    let pending = "";
    let frame = 0;
    const paint = () => { // once a frame, however fast the tokens come
      frame = 0;
      text.appendData(pending);
      pending = "";
      stats.textContent = clock.text() + ending;
      this.#follow();
    };
    try {
      for await (const chunk of chat({ model, messages: mine, return_token_ids: true }, abort.signal)) {
        if (chunk.comment) {
          const place = /^queued (\d+)$/.exec(chunk.comment)?.[1];
          wait(chunk.comment === "working" ? "" : place ? `waiting, place ${place} in the queue` : chunk.comment);
          continue;
        }
        const choice = chunk.choices[0];
        clock.tokens(choice.token_ids?.length ?? 0);
        pending += choice.delta.content ?? "";
        if (pending || text.data) wait("");
        if (choice.finish_reason === "length") ending = " · cut at the length limit";
        frame ||= requestAnimationFrame(paint);
      }
    } catch (error) {
      if (abort.signal.aborted) ending = " · stopped";
      else message.append(make("span", { className: "error", role: "alert" }, error.message));
    } finally {
      wait("");
      if (this.abort === abort) this.abort = null;
      cancelAnimationFrame(frame);
      paint();
      waiting.remove();
      message.classList.remove("writing");
      this.log.setAttribute("aria-busy", "false");
      if (text.data) mine.push({ role: "assistant", content: text.data });
      else mine.pop(); // an unanswered question is not sent again
      this.#follow();
      this.changed();
    }
  }
}

/** Tokens and their pace: the first token's wait counts apart from the rest. */
class Clock {
  constructor() { this.asked = performance.now(); this.count = 0; }

  tokens(number) {
    if (!number) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.firstCount ??= number;
    this.count += number;
  }

  text() {
    if (!this.count) return "";
    const found = [count(this.count, "token")];
    const burst = this.last - this.first < BURST_MS;
    const tokens = burst ? this.count : this.count - this.firstCount;
    found.push(`${((1000 * tokens) / (this.last - (burst ? this.asked : this.first))).toFixed(1)} tokens/s`);
    found.push(`first after ${((this.first - this.asked) / 1000).toFixed(2)} s`);
    return found.join(" · ");
  }
}
