// One button hears A and B in turn, each from the moment at which the other was left.
function hearOther(button) {
    const [a, b] = document.querySelectorAll("#result audio");
    const toA = button.dataset.side !== "A";
    const [from, to] = toA ? [b, a] : [a, b];
    from.pause();
    to.currentTime = from.ended ? 0 : from.currentTime;
    to.play();
    button.dataset.side = toA ? "A" : "B";
    button.textContent = toA ? "Playing A. Switch to B" : "Playing B. Switch to A";
}
