// Loaded before the page is drawn, so that it never flashes in the wrong colours.
(() => {
  const kept = localStorage.getItem("tidegate.theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
