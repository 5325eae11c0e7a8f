"""A perturbed patch on the page: the changed picture under its map, the answers, and the numbers of the whole model."""

from __future__ import annotations

from lens.probes.test_patch_perturbation import Bright, pixels
from report.test_browser import cells, heads, visit
from vitreous.lens.look import look
from vitreous.lens.probes.patch_perturbation import PatchPerturbation
from vitreous.report.page import write

LIGHT = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const of = (x, y) => {
    const at = 4 * (Math.floor(y * canvas.height) * canvas.width + Math.floor(x * canvas.width));
    return [...data.slice(at, at + 3)];
  };
  return [of(0.625, 0.375), of(0.125, 0.875)];
}"""  # in the patch at row 1, column 2 of 4 x 4, and in another


def test_the_patch_is_seen_before_and_after(browser, tmp_path):
    images = 0.3 + 0.02 * pixels(2)
    probes = ["rollout", PatchPerturbation(at=(1, 2), steps=10, step=0.1)]
    look(Bright(), images, probes=probes, noise=0, out=tmp_path / "reading")
    write([tmp_path / "reading"], tmp_path / "page.html")
    for name, answer, bright in (("rollout_before", "0", False), ("rollout_after", "1", True)):
        with visit(browser, tmp_path / "page.html", f"#maps?image=1&map={name}&layer=0&head=-1") as page:
            page.get_by_label("Opacity of the map").fill("0")
            patch, other = page.locator("canvas[data-pane='0']").evaluate(LIGHT)
            assert (sum(patch) > 700) == bright
            assert sum(other) < 300
            assert f"Class of this mapclass {answer}" in page.locator(".image-facts").first.text_content()
            assert heads(page, "#whole")[:2] == ["At", "Fooled"]
            assert cells(page, "#whole")[0][:2] == ["T = 1", "1"]
            assert not page.locator("#indicators").is_visible()
