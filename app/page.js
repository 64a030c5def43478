// Buttons inside our HTML are found by their data-do; the address follows the tab; Escape stops; what is copied is as it
// was written.
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
  // Gradio sets the system's choice when it starts; a choice made here before comes after it.
  const started = setInterval(() => {
    if (!document.querySelector(".top")) return;
    clearInterval(started);
    if (kept() && !new URL(location).searchParams.has("__theme")) dark(kept() === "dark");
    document.documentElement.lang = "en";
  }, 50);
})();
