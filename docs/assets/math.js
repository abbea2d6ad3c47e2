// Renders what pymdownx.arithmatex marked: \( inline \) and \[ display \].
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const tex = element.textContent.trim();
    if (!tex.startsWith("\\(") && !tex.startsWith("\\[")) continue; // rendered already
    katex.render(tex.slice(2, -2), element, {
      displayMode: tex.startsWith("\\["),
      throwOnError: false,
    });
  }
});
