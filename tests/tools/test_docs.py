"""The documentation is true: snippets run and print what the pages say, links lead somewhere,
tables match the code, the formulae of mathematics.md give autograd's gradients, and the site
builds."""

import contextlib
import io
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import normnorm
from normnorm import backends, diagnostics, functional, norm_map, reference
from normnorm.noise import standard_normals
from normnorm.ops import SCHEMAS
from normnorm.statistics import Row
from speed.results import FORMAT
from speed.tables import readme_files, readme_section, with_section

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ROOT / "docs/internals/backends.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_PAGE = [*PAGES, ROOT / "CONTRIBUTING.md"]

_SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.S | re.M)
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def page_name(page):
    return page.relative_to(ROOT).as_posix()


# Snippets


def snippets(page):
    """(line, code, output promised) of each Python block of a page."""
    text = page.read_text()
    for match in _SNIPPET.finditer(text):
        yield text[: match.start(1)].count("\n") + 1, match[1], match[2]


def run_page(page, how_many=None):
    """Runs a page's (first) snippets in one namespace: that namespace, and what they print."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    printed = []
    torch._dynamo.reset()  # what was compiled before changes how often a page compiles
    # What a page registers or chooses ends with it.
    with (
        mock.patch.object(backends, "_selected", backends._selected),
        mock.patch.dict(norm_map._REGISTERED),
    ):
        for line, code, _ in itertools.islice(snippets(page), how_many):
            out = io.StringIO()
            # Line numbers in a traceback are those of the page.
            compiled = compile("\n" * (line - 1) + code, str(page), "exec")
            with contextlib.redirect_stdout(out):
                exec(compiled, namespace)
            printed.append(out.getvalue())
    return namespace, printed


def same_number(got, promised):
    """Rounding errors, written as 1.2e-07, agree in their order of magnitude; the rest to 2 %."""
    a, b = float(got), float(promised)
    if "e" in promised:
        return a == b or (a * b > 0 and 1 / 30 < a / b < 30)
    return math.isclose(a, b, rel_tol=0.02, abs_tol=0.011)


def disagreement(got, promised):
    got_words, promised_words = got.split(), promised.split()
    if len(got_words) != len(promised_words):
        return f"{len(got_words)} words, not {len(promised_words)}"
    for a, b in zip(got_words, promised_words, strict=True):
        numbers = [_NUMBER.fullmatch(word.strip(",")) for word in (a, b)]
        if all(numbers):
            if not same_number(a.strip(","), b.strip(",")):
                return f"'{a}', not '{b}'"
        elif a != b:
            return f"'{a}', not '{b}'"
    return None


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_snippets_run_and_print_what_the_page_says(page):
    _, printed = run_page(page)
    for (line, _, promised), got in zip(snippets(page), printed, strict=True):
        if promised is not None:
            wrong = disagreement(got, promised)
            assert wrong is None, f"{page_name(page)}:{line} prints {wrong}:\n{got}"


# Links and tables


def anchors(page):
    """Heading anchors as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=page_name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_name(page)} links to {link}"
        assert ROOT in (target, *target.parents), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{page_name(page)} links to {link}"


def table_rows(text):
    """The cells of the first table in a text, without its head."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    # An escaped bar is no border.
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_tables_of_the_backends_page_match_the_code():
    text = BACKENDS.read_text()

    def rows(heading):
        section = text.split(f"{heading}\n")[1]
        return [[cell.strip("`") for cell in cells[:2]] for cells in table_rows(section)]

    for op, schema in SCHEMAS.items():
        arguments = schema.removeprefix("(").split(") ->")[0].split(", ")
        assert rows(f"### {op}") == [argument.rsplit(" ", 1)[::-1] for argument in arguments]
    assert rows("## The statistics tensor") == [[str(int(row)), row.name] for row in Row]
    assert tuple(name for name, _ in rows("## Choosing")) == backends.NAMES


# The site


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page_and_public_name(tmp_path):
    options = ["-b", "html", "-q", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, ".", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in EVERY_PAGE:
        html = (tmp_path / "site" / page.relative_to(ROOT).with_suffix(".html")).read_text()
        links = re.findall(r'href="([^":#]+)[#"]', html.split("<article", 1)[1])
        assert [link for link in links if link.endswith(".md")] == []
    reference_page = (tmp_path / "site/docs/reference.html").read_text()
    named = re.findall(r' id="(normnorm\.[\w.]+)"', reference_page)
    for module in (normnorm, functional, diagnostics):
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        assert {f"{module.__name__}.{name}" for name in public} <= set(named)


def test_readme_opens_with_its_status_and_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "**Status:**" in text.splitlines()[3]
    first_block = re.search(r"^```\n(.*?)^```$", text, re.S | re.M)
    assert first_block is not None
    commands = [line.split("#")[0].strip() for line in first_block[1].splitlines()]
    assert commands == ["make demo", "make test"]


def test_readme_performance_is_what_make_report_renders_from_all_stored_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = readme_files(text, ROOT)
    stored = (ROOT / "benchmarks/results").glob("*.json")
    assert set(paths) == {path for path in stored if f'"format": "{FORMAT}"' in path.read_text()}
    assert with_section(text, readme_section(paths, ROOT)) == text


def test_readme_names_every_extra():
    section = (ROOT / "README.md").read_text().split("Extras install the rest:\n")[1]
    named = {word for cells in table_rows(section) for word in re.findall(r"`(\w+)`", cells[0])}
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    assert named == set(re.findall(r"^(\w+) = \[", extras, re.M))


# The formulae of mathematics.md: the page's own NumPy against autograd of the definition


@pytest.fixture(scope="module")
def page():
    """What the page's first snippet defines: psi, newton, forward, backward, frozen_backward."""
    return run_page(ROOT / "docs/internals/mathematics.md", how_many=1)[0]


def law(name, *shape):
    normal = torch.randn(*shape, dtype=torch.float64)
    return {
        "normal": normal,
        "lognormal": normal.exp(),
        "relu": normal.relu(),  # half of the values are equal, lambda is near 0
        "negated": -normal.exp(),  # lambda is near 2
        "offset": 0.01 * normal + 50.0,
    }[name]


LAWS = ("normal", "lognormal", "relu", "negated", "offset")


def assert_same(got, expected, tolerance=1e-11):
    expected_array = expected.detach().numpy()
    size = max(1.0, float(np.abs(expected_array).max()))
    np.testing.assert_allclose(got, expected_array, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("transform_eps", [0.0, math.sqrt(1e-5)])
@pytest.mark.parametrize(("order", "alpha"), [(2, 1.0), (2, 0.3), (1, 1.0), (2, 0.0)])
def test_documented_gradient(page, order, alpha, transform_eps):
    options = {"alpha": alpha, "order": order, "transform_eps": transform_eps}
    noise_train, seed = 0.4, torch.tensor([11])
    for name in LAWS:
        u, g = law(name, 12, 30).requires_grad_(), law("normal", 12, 30)
        weight, bias = (law("normal", 30).requires_grad_() for _ in range(2))
        out, statistics = reference.normal_norm(
            u, weight, bias, kind="layer", normalized_ndim=1, noise_train=noise_train, seed=seed,
            **options,
        )  # fmt: skip
        du, dweight, dbias = torch.autograd.grad(out, (u, weight, bias), g)

        rows = u.detach().numpy()
        x, s = zip(*(page["forward"](row, **options) for row in rows), strict=True)
        np.testing.assert_allclose(s, statistics[Row.NOISE_SCALE].numpy(), rtol=1e-11)
        z = standard_normals(u.shape, seed).numpy()
        y = np.array(x) + noise_train * np.array(s)[:, None] * z
        assert_same(y * weight.detach().numpy() + bias.detach().numpy(), out)

        G = (weight * g).detach().numpy()
        pairs = zip(G, rows, strict=True)
        assert_same(np.array([page["backward"](*pair, **options) for pair in pairs]), du)
        assert_same((g.numpy() * y).sum(0), dweight)
        assert_same(g.numpy().sum(0), dbias)


@pytest.mark.parametrize("transform_eps", [0.0, math.sqrt(1e-5)])
@pytest.mark.parametrize("lmbda", [1.0, 0.0, 2.0, 1e-9, 2 - 1e-3, 1e-3, 0.3, -1.7, 3.4])
def test_documented_transform_and_gradient_of_frozen_statistics(page, lmbda, transform_eps):
    h = torch.cat([law("normal", 200), torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    power = torch.full_like(h, lmbda).requires_grad_()
    x = reference.yeo_johnson(h, power, transform_eps)
    psi_h, psi_lam = torch.autograd.grad(x.sum(), (h, power))
    ours = page["psi"](h.detach().numpy(), lmbda, transform_eps)
    for got, expected in zip(ours, (x, psi_h, psi_lam), strict=True):
        assert_same(got, expected, 1e-13)
    assert (ours[1] > 0).all()
    assert (ours[2] >= 0).all()

    u, g = law("lognormal", 50, 1).requires_grad_(), law("normal", 50, 1)
    mean, var, power = (torch.tensor([value], dtype=torch.float64) for value in (0.7, 2.0, lmbda))
    out, _ = reference.normal_norm(
        u, kind="batch", transform_eps=transform_eps,
        frozen=reference.pack_running(mean, var, power, 1e-5, torch.float64),
    )  # fmt: skip
    (du,) = torch.autograd.grad(out, u, g)
    ours = page["frozen_backward"](
        g.numpy(), u.detach().numpy(), 0.7, 2.0, lmbda, transform_eps=transform_eps
    )
    assert_same(ours, du)


@pytest.mark.parametrize("name", LAWS)
def test_documented_newton_step_and_invariants(page, name):
    u = law(name, 1, 400).requires_grad_()
    h, mean, low, rstd = reference.standardize(u, (1,), 1e-5)
    for order in (1, 2):
        lmbda = reference.estimate_lmbda(h, (1,), order=order)
        by_h, by_u = torch.autograd.grad(lmbda, (h, u), retain_graph=True)
        ours, w = page["newton"](h.detach().numpy()[0], 1e-5, 1.0, order)
        assert_same(np.array([[ours]]), lmbda)
        assert_same(w / 400, by_h[0])
        scale = by_u.abs().sum().item() + 1.0
        assert abs(by_u.sum().item()) < 1e-12 * scale
        moved = ((u - mean - low) * by_u).sum().item()
        eps_term = (1e-5 * rstd.square()).item() * float((h.detach().numpy()[0] * w).mean())
        assert abs(moved - eps_term) < 1e-11 * scale
