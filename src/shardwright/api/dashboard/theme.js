// Runs before the page is drawn: the theme that was chosen here before, or else the system's.
(() => {
  const NAME = "shardwright.theme";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem(NAME);
    } catch {
      return null; // storage is off: the system's theme it is
    }
  };
  const apply = () => {
    document.documentElement.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
    document.dispatchEvent(new Event("themechange"));
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("themetoggle", () => {
    const other = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      // The system's own theme needs no memory: the page then goes on following it.
      if (other === (system.matches ? "dark" : "light")) localStorage.removeItem(NAME);
      else localStorage.setItem(NAME, other);
    } catch {
      document.documentElement.dataset.theme = other;
      document.dispatchEvent(new Event("themechange"));
      return;
    }
    apply();
  });
})();
