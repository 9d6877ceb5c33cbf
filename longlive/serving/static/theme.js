// Dark or light theme: the system's, unless the user has chosen one. A classic script in <head>, so that the first paint is right.

(() => {
  const KEY = "longlive.theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  const chosen = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const apply = () => {
    const wanted = chosen();
    root.dataset.theme = wanted === "dark" || wanted === "light" ? wanted : system.matches ? "dark" : "light";
  };

  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const other = root.dataset.theme === "dark" ? "light" : "dark";
      root.dataset.theme = other;
      try {
        localStorage.setItem(KEY, other);
      } catch {
        // forbidden: the choice lasts until the page is closed
      }
    });
  });
})();
