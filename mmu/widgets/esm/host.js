// Mounts the players on a page without a kernel: the part of a Jupyter front end that their modules use, and no more.
// Works from file:// too, since modules come from the page's own script and not by request.
(() => {
  const loaded = {};
  const load = (name) => {
    const address = () => URL.createObjectURL(new Blob([window.MMU_PLAYERS[name]], { type: "text/javascript" }));
    return (loaded[name] ??= import(address()));
  };

  // What anywidget calls a model: get, set, on and off; nobody listens at the other end of save_changes.
  const modelOf = (data) => {
    const state = { data }, listeners = {};
    return {
      get: (key) => state[key],
      set: (key, value) => { state[key] = value; (listeners[`change:${key}`] ?? []).forEach((f) => f()); },
      on: (name, f) => (listeners[name] ??= []).push(f),
      off: (name, f) => { listeners[name] = (listeners[name] ?? []).filter((g) => f && g !== f); },
      save_changes() {},
    };
  };

  const mount = async (twin) => {
    if (twin.dataset.mounted) return;
    twin.dataset.mounted = "trying";
    const el = document.createElement("div");
    try {
      const data = JSON.parse(twin.querySelector("script").textContent);
      const module = await load(twin.dataset.player);
      const player = typeof module.default === "function" ? await module.default() : module.default;
      await player.render({ model: modelOf(data), el });
      twin.querySelector(".mmu-fallback").hidden = true;
      twin.append(el);
      twin.dataset.mounted = "yes";
    } catch (error) {
      twin.dataset.mounted = "failed"; // the sentence stays, which says what would stand here
      console.error("player", twin.dataset.player, error);
    }
  };

  const all = () => [...document.querySelectorAll(".mmu-player")];
  const start = () => {
    const near = new IntersectionObserver(
      (entries) => entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
        near.unobserve(target);
        mount(target);
      }),
      { rootMargin: "800px" });
    all().forEach((twin) => near.observe(twin));
    const follow = () => { if (location.hash.includes("=")) all().forEach(mount); }; // a link into a player
    addEventListener("hashchange", follow);
    follow();
    addEventListener("beforeprint", () => all().forEach(mount));
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
