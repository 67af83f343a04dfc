// Keys, the browser's history, and what a click sends: see desk.py. The question on the screen, not
// one the server has in mind, is what is voted on.
const arena = (() => {
  const KEYS = {
    1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 3: "tie", t: "tie",
    4: "bad", b: "bad", Backspace: "back", z: "back", n: "forward",
  };
  const pair = () => document.getElementById("arena-pair");
  const rater = () => localStorage.getItem("arena-rater") || "";
  const send = (what) => [JSON.stringify({ rater: rater(), ...what })];
  const hashed = () => {
    const place = parseInt(location.hash.slice(1), 10);
    return Number.isSafeInteger(place) && place > 0 ? { place } : {};
  };
  const here = () => parseInt(pair()?.dataset.place, 10) || 0;
  let last = 0; // the greatest place seen, for Back from the end
  const loaded = () =>
    [...document.querySelectorAll("#arena-pair img")].every((i) => i.complete && i.naturalWidth);

  const noted = () => {
    const place = here();
    if (!pair() || place === noted.place) return;
    noted.place = place;
    last = Math.max(last, place);
    const hash = "#" + (place || "end");
    if (location.hash === hash) return;
    const keep = location.hash === "" ? "replaceState" : "pushState";
    history[keep](history.state, "", hash);
  };
  new MutationObserver(noted).observe(document, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["data-place"],
  });
  addEventListener("popstate", () => document.getElementById("arena-go")?.click());

  addEventListener("keydown", (event) => {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const typing = event.target.closest?.("input, textarea, select, [role=tab], [contenteditable]");
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || typing) return;
    const button = KEYS[key] && document.getElementById("arena-" + KEYS[key]);
    if (!button || !button.offsetParent) return; // not on the screen
    event.preventDefault();
    button.click();
  });

  return {
    vote: (side) =>
      send({ item: pair()?.dataset.item || "", choice: loaded() ? side : "waiting" }),
    back: () => send({ place: here() ? Math.max(1, here() - 1) : last || 1 }),
    forward: () => send({ place: here() + 1 }),
    go: () => send(hashed()),
    leave: () => {
      localStorage.removeItem("arena-rater");
      history.replaceState(history.state, "", location.pathname);
      return send({});
    },
    load: () => send(hashed()),
    start: () => {
      const name = document.querySelector("#arena-name input, #arena-name textarea");
      localStorage.setItem("arena-rater", name.value.trim());
      name.blur();
      noted.place = undefined;
      last = 0;
      history.replaceState(history.state, "", location.pathname);
      return send({});
    },
    look: (model, other) => [send({})[0], model, other],
  };
})();
