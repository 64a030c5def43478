// Buttons inside our HTML are found by their data-do; the address follows the tab; Escape stops; what is copied is as
// it was written; long answers are scrolled along; what is finished is said to screen readers.
(() => {
  // app.render.chat_text puts it behind what HTML would begin with.
  const asWritten = (text) => text.replaceAll("\u2060", "");
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(asWritten(text));
  }
  document.addEventListener("copy", (event) => {
    const text = String(getSelection());
    if (text === asWritten(text)) return;
    event.clipboardData.setData("text/plain", asWritten(text));
    event.preventDefault();
  });
  const dark = (on) => document.body.classList.toggle("dark", on);
  const kept = () => { try { return localStorage.getItem("mmadapter-theme"); } catch { return null; } };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-do]");
    if (button && button.dataset.do === "theme") {
      const on = !document.body.classList.contains("dark");
      dark(on);
      try { localStorage.setItem("mmadapter-theme", on ? "dark" : "light"); } catch { /* not kept, then */ }
    }
    if (button && button.dataset.do === "copy") {
      const text = [...button.closest(".answer").querySelectorAll(".words")].map((words) => words.innerText).join("\n");
      let done = "Copied";
      try { await navigator.clipboard.writeText(text); } catch { done = "Not allowed"; }
      button.textContent = done;
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }
    const tab = event.target.closest("[role=tab]");
    if (tab) {
      const name = (tab.id.match(/(caption|ask|chat)/) || [])[1];
      if (name) {
        const address = new URL(location);
        address.searchParams.set("tab", name);
        history.replaceState(history.state, "", address);
      }
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const stop = [...document.querySelectorAll("button.stop-now")].find((one) => one.offsetParent && !one.disabled);
    if (stop) stop.click();
  });
  // Gradio puts an answer's HTML in anew at each token, which scrolls it back to its top: kept are the places that a
  // reader scrolled to, by result and card, until the next answer; the others follow their one text to its end.
  const scrolled = new WeakMap();
  document.addEventListener("scroll", (event) => {
    const result = event.target.closest?.("#caption-result, #ask-result");
    if (!result || !event.target.matches(".text")) return;
    const { scrollTop, clientHeight, scrollHeight } = event.target;
    const card = [...result.querySelectorAll(".text")].indexOf(event.target);
    scrolled.get(result)?.set(card, scrollTop + clientHeight > scrollHeight - 8 ? Infinity : scrollTop);
  }, true);
  const follow = (result, anew) => {
    if (anew || !scrolled.has(result)) scrolled.set(result, new Map());
    result.querySelectorAll(".text").forEach((box, card) => {
      const end = box.querySelectorAll(".words").length > 1 ? 0 : box.scrollHeight;
      box.scrollTop = Math.min(scrolled.get(result).get(card) ?? end, box.scrollHeight);
    });
  };
  // Said once, when it is finished, by one element that stays.
  const aloud = document.createElement("div");
  aloud.id = "aloud";
  aloud.setAttribute("role", "status");
  const texts = (place, names) => [...place.querySelectorAll(names)].map((one) => one.innerText.trim()).filter(Boolean);
  const finished = (place) => {
    const said = texts(place, ".who, .words, .best, footer span, .thanks, .head span");
    if (place.id !== "chat-status" || !place.querySelector("[aria-busy]")) return said.join("\n");
    const last = [...document.querySelectorAll("#chat-0, #chat-1")].map((chat) => texts(chat, ".bot .prose").pop());
    return [...last.filter(Boolean), ...said].join("\n");
  };
  const known = new WeakMap();
  const look = () => {
    document.querySelectorAll("#chat-0 [role=log], #chat-1 [role=log]").forEach((log) => { log.ariaLive = "off"; });
    const places = "#caption-result, #ask-result, #chat-status, #caption-many, .block.said";
    document.querySelectorAll(places).forEach((place) => {
      const busy = Boolean(place.querySelector("[aria-busy=true]"));
      const text = busy ? "" : finished(place);
      if (place.matches("#caption-result, #ask-result")) follow(place, busy && known.get(place));
      if (text && text !== known.get(place)) aloud.textContent = asWritten(text);
      known.set(place, text);
    });
  };
  // Gradio sets the system's choice when it starts; a choice made here before comes after it.
  const started = setInterval(() => {
    const tabs = document.querySelector("#tabs");
    if (!tabs) return;
    clearInterval(started);
    if (kept() && !new URL(location).searchParams.has("__theme")) dark(kept() === "dark");
    document.documentElement.lang = "en";
    document.body.append(aloud);
    new MutationObserver(look).observe(tabs, { childList: true, subtree: true });
  }, 50);
})();
