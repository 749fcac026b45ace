"""The pages say what is true of the programs, and their code does what it says.

Needs the main job, whose model the recipes draw.
"""

import json
import re
import shutil
import subprocess

import pytest
from harness import (
    ROOT,
    SCRIPT,
    SMALL,
    expect_success,
    levels,
    make_clone,
    run_script,
)

import quest_12_1 as quest

README = ROOT / "README.md"
EXPLANATION = ROOT / "dreams" / "how_it_works.md"
RECIPES = ROOT / "dreams" / "README.md"
PAGES = [
    README,
    EXPLANATION,
    RECIPES,
    ROOT / "data" / "README.md",
    ROOT / "tests" / "README.md",
]


# ---- Reading a page ------------------------------------------------------------------
def blocks(page, language):
    """Return the code blocks of a page that are marked with this language, or with
    none if it is ""."""
    text = page.read_text(encoding="utf-8")
    marked = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in marked if name == language]


def run_code(code):
    """Run a page's own lines as they are printed; return the names that they leave."""
    names = {}
    exec(code, names)  # noqa: S102
    return names


def block_with(page, language, part):
    """Return the one code block of a page that holds `part`."""
    found = [code for code in blocks(page, language) if part in code]
    assert len(found) == 1, f"{len(found)} blocks of {page.name} hold {part!r}, not 1"
    return found[0]


def prose_of(page):
    """Return a page's text without its code blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page):
    """Return the anchors that GitHub gives to a page's headings, and the page's own."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    } | set(re.findall(r'<a id="([^"]+)">', prose_of(page)))


def links_of(page):
    """Return the targets of a page's links and pictures that lie in the project."""
    prose = prose_of(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    targets += re.findall(r'(?:src|href)="([^"]+)"', prose)
    return [target for target in targets if "://" not in target]


# ---- Links, pictures, options --------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist(page):
    for target in links_of(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"there is no {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{path.name} has no anchor {anchor}"


def test_every_committed_picture_is_shown_and_has_a_recipe():
    pictures = {path.name for path in (ROOT / "dreams").glob("example_*")}
    targets = links_of(README) + links_of(EXPLANATION)
    shown = {target.split("/")[-1] for target in targets if "example_" in target}
    assert pictures == shown

    recipes = RECIPES.read_text(encoding="utf-8")
    assert {name for name in pictures if f"`{name}`" in recipes} | {
        name for name in pictures if re.search(rf"^### .*{name}", recipes, re.MULTILINE)
    } == pictures


def test_every_picture_has_words_for_those_who_cannot_see_it():
    for page in (README, EXPLANATION):
        for picture in re.findall(r"<img [^>]*>", page.read_text(encoding="utf-8")):
            assert re.search(r'alt="[^"]{10,}"', picture), picture


def test_the_table_of_options_names_the_options_of_help_with_their_defaults(call):
    told = dict(
        re.findall(r"^\| `(--[\w-]+)` \| *(\S*) \|", README.read_text(), re.MULTILINE)
    )
    listed = call(quest.main, "--help").stdout
    assert set(told) == set(re.findall(r"--[\w-]+", listed)) - {"--help"}

    settings, args = quest.parse([])
    defaults = {**vars(settings), "device": args.device, "output": args.output}
    for name, default in defaults.items():
        text = f"{default:g}" if isinstance(default, float) else str(default)
        assert told["--" + name.replace("_", "-")] == text


def test_help_and_table_say_the_same_of_what_a_value_does_to_the_loss(call):
    """The table says "200: +1.9 ± 0.5", --help "with 200 the loss is 2 higher"."""
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*)$", README.read_text(), re.MULTILINE)
    told = [
        (option, value, change)
        for option, row in rows
        for value, change in re.findall(r"(\d+): ([+-]\d+\.\d) ±", row)
    ]

    listed = " ".join(call(quest.main, "--help").stdout.split())

    assert told
    for option, value, change in told:
        text = re.search(rf"{option} [A-Z_]+ (.*?)\(default", listed)[1]
        said = re.search(rf"\b{value}\b\D*(\d+) (higher|lower)", text)
        assert said, f"{option} {value}: {change} in the table, nothing in --help"
        in_help = int(said[1]) * (1 if said[2] == "higher" else -1)
        assert in_help == pytest.approx(float(change), abs=0.6), (
            f"{option} {value}: {change} in the table, in --help {said[0]!r}"
        )


def test_the_tests_own_command_stands_at_the_start_of_one_line():
    lines = README.read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("python -m pip install")]
    assert len([line for line in commands if "pytest" in line]) == 1


# ---- What a run says -----------------------------------------------------------------
def form_of(text):
    """Return a text with each number replaced, and its lines joined by spaces."""
    return re.sub(r"\d+(\.\d+)?", "0", " ".join(text.split()))


def test_the_readme_shows_the_end_of_a_run_as_it_is(small_run):
    told = block_with(README, "", "The dream is ready")
    epoch, _, message = told.partition("\n")

    assert form_of(epoch) in form_of(small_run.result.stderr)
    said = json.loads(small_run.result.stdout)["message"]
    assert form_of(message).replace("dreams/", "") == form_of(
        said.replace("runs/seed 3/", "")
    )


def test_the_readme_names_the_keys_of_json(small_run):
    (paragraph,) = re.findall(r"^With `--json`, .*$", README.read_text(), re.MULTILINE)
    result = json.loads(small_run.result.stdout)
    assert set(re.findall(r"`(\w+)`", paragraph)) == {*result, *result["losses"][0]}


# ---- Code that is run as printed -----------------------------------------------------
@pytest.fixture
def trained(tmp_path, main_job, monkeypatch):
    """A clone with the model of the main job, as the current folder."""
    make_clone(tmp_path, ROOT / "data")
    shutil.copy(main_job.output / "dream_model.pt", tmp_path / "dreams")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_direct_draw_passes_zeros_back_and_the_trick_ones(capsys):
    code = block_with(EXPLANATION, "python", "torch.normal")
    run_code(code)
    assert capsys.readouterr().out.splitlines() == re.findall(r"  # (tensor.*)", code)


def test_the_check_of_the_bound_prints_what_the_page_says(trained, capsys):
    run_code(block_with(EXPLANATION, "python", "log_px"))
    form = r"loss (\d+\.\d), -log p\(x\) (\d+\.\d)"
    printed = re.fullmatch(form + "\n", capsys.readouterr().out)
    told = re.search(f"prints `{form}`", EXPLANATION.read_text(encoding="utf-8"))
    for said, expected in zip(printed.groups(), told.groups(), strict=True):
        assert float(said) == pytest.approx(float(expected), abs=1)


def test_the_lines_for_the_saved_model_open_it(trained, capsys):
    run_code(block_with(README, "python", "load_state_dict"))
    assert "'seed': 0" in capsys.readouterr().out


def test_the_lines_for_a_notebook_train(folder):
    run_code(block_with(README, "python", "quest.main"))
    assert (folder / "runs" / "notebook" / "dream_sample.png").is_file()


def test_the_lines_that_train_without_files_give_points_to_plot(folder):
    names = run_code(block_with(README, "python", "quest.learn"))
    assert names["points"].shape == (len(names["x_test"]), 2)
    assert list((folder / "dreams").glob("dream_*")) == []


def test_the_lines_that_take_out_the_noise_change_one_line(folder):
    lines = block_with(EXPLANATION, "", "no_noise.py").splitlines()
    subprocess.run("\n".join(lines[:-1]), shell=True, check=True)
    before = SCRIPT.read_text().splitlines()
    after = (folder / "runs" / "no_noise.py").read_text().splitlines()
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert changed == ["        return mu"]


def test_the_edits_for_the_class_turn_the_script_into_one_that_trains(folder):
    script = SCRIPT.read_text()
    (patch,) = blocks(README, "diff")
    for edit in re.split(r"^@@.*@@\n", patch, flags=re.MULTILINE)[1:]:
        lines = edit.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line.startswith("-"))
        new = "".join(line[1:] for line in lines if line.startswith("+"))
        assert script.count(old) == 1, f"not once in the script: {old}"
        script = script.replace(old, new)
    (folder / "quest_12_1.py").write_text(script)

    expect_success(run_script(folder, "--epochs", "1", "--samples", "80"))
    sample = levels(folder / "dreams" / "dream_sample.png")
    committed = levels(ROOT / "dreams" / "example_class.png")
    assert sample.shape == committed.shape  # ten rows of eight


def test_the_lines_for_a_smaller_rate_are_followed_by_training(folder, small_run):
    script = SCRIPT.read_text()
    (lines,) = blocks(README, "py")
    place = "        train_loss = "
    assert script.count(place) == 1
    (folder / "quest_12_1.py").write_text(script.replace(place, lines + place))

    result = run_script(folder, *SMALL)

    expect_success(result)
    first, second = json.loads(result.stdout)["losses"]
    unchanged_first, unchanged_second = json.loads(small_run.result.stdout)["losses"]
    assert first == unchanged_first
    assert second != unchanged_second, "the smaller rate changes nothing"


# ---- Recipes of pictures -------------------------------------------------------------
QUICK = ["cloud", "mean", "glow", "clouds", "width", "noise", "bound"]
# What takes seconds as printed: fewer numbers, which hardly change the picture.
QUICKER = {
    "glow": {"range(400)": "range(100)"},
    "width": {"randn(5, 1000, 2)": "randn(1, 1000, 2)"},
    "bound": {"linspace(-6, 6, 161)": "linspace(-6, 6, 81)"},
}


@pytest.mark.parametrize("name", QUICK)
def test_the_recipe_of_a_picture_makes_it_again(trained, name):
    code = block_with(RECIPES, "python", f"dreams/example_{name}.png")
    for printed, quicker in QUICKER.get(name, {}).items():
        code = code.replace(printed, quicker)

    run_code(code)

    made = levels(trained / "dreams" / f"example_{name}.png", "RGB")
    committed = levels(ROOT / "dreams" / f"example_{name}.png", "RGB")
    assert made.shape == committed.shape

    # Another machine's model differs a little. So do its pictures, not their light.
    assert made.mean().item() == pytest.approx(committed.mean().item(), rel=0.1)


def test_the_recipe_of_three_models_makes_a_picture_of_the_committed_size(trained):
    for beta in (
        0,
        1,
        30,
    ):  # one model stands for the three: training them takes minutes
        folder = trained / "runs" / f"beta{beta}"
        folder.mkdir(parents=True)
        shutil.copy(trained / "dreams" / "dream_model.pt", folder)
        shutil.copy(ROOT / "dreams" / "example_class.png", folder / "dream_sample.png")

    run_code(block_with(RECIPES, "python", "example_beta.png"))
    made = levels(trained / "dreams" / "example_beta.png")
    assert made.shape == levels(ROOT / "dreams" / "example_beta.png").shape
