// Runs before anything is painted, so that a chosen theme does not flash.
try {
  const theme = localStorage.getItem("jaxpaged.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage in this browser: the system's theme holds.
}
