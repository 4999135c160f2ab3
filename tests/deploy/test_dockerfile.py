"""What the Dockerfile promises, as far as its text shows it. `tests/deploy/containers.py` builds and runs it."""

import fnmatch
import re

from server.settings import SECRETS_FOLDER_ENV, Settings
from tests.deploy.compose_file import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = TEXT.replace("\\\n", " ").splitlines()


def test_any_builder_can_build_it() -> None:
    """A syntax line loads a frontend from a registry; mounts, heredocs and --chmod are BuildKit's alone."""
    assert not re.search(r"^#\s*(syntax|check)\s*=", TEXT, flags=re.MULTILINE | re.IGNORECASE)
    assert not re.search(r"--mount=|--chmod=|--link|<<", TEXT)


def test_all_that_it_copies_is_in_the_build_context_and_nothing_else_is() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [line.split()[1:-1] for line in LINES if line.startswith("COPY ") and "--from=" not in line]
    sources = {source for sources in copied for source in sources}
    assert "*" in rules
    assert {source for source in sources if not any(fnmatch.fnmatch(source, f"{rule}*") for rule in kept)} == set()
    assert {rule for rule in kept if not any(source.startswith(rule) for source in sources)} == set()
    assert all((ROOT / source).exists() for source in sources)


def test_the_settings_that_it_makes_are_settings_of_the_server() -> None:
    named = {name.removeprefix("TIDEGATE_").lower() for name in re.findall(r"(TIDEGATE_[A-Z_]+)=", TEXT)}
    assert named - {SECRETS_FOLDER_ENV.removeprefix("TIDEGATE_").lower()} <= set(Settings.model_fields)


def test_both_images_run_as_a_user_that_is_not_root() -> None:
    stages = dict(zip(*[iter(re.split(r"^FROM \S+ AS (\S+)$", TEXT, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for name in ("cpu", "gpu"):
        steps = [line for line in stages[name].splitlines() if re.match(r"[A-Z]+ ", line)]
        assert steps[-1] == "USER 10001:10001"
