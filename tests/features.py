"""Which tests show that a feature works, and what they gave: the mechanics of the tables that the suite writes."""

import re

__all__ = ["Recorder", "features_of"]


def features_of(nodeid, features):
    """The features that a test stands for. features: {feature: tests}, each by its file, by how its name begins and,
    where there is a third, by a regular expression that is found in its parameters."""
    file, _, name = nodeid.removeprefix("tests/").partition("::")
    name, _, parameters = name.rstrip("]").partition("[")
    for feature, tests in features.items():
        for test, prefix, *pattern in tests:
            if file == test and name.startswith(prefix) and all(re.search(one, parameters) for one in pattern):
                yield feature
                break


class Recorder:
    """A pytest plugin that keeps the outcomes of the tests of features, and at the end calls write({feature: cell})."""

    def __init__(self, features, write):
        self.features, self.write = features, write
        self.outcomes = {feature: {} for feature in features}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[-1].removeprefix("Skipped: ") if report.outcome == "skipped" else None
            for feature in features_of(report.nodeid, self.features):
                self.outcomes[feature][report.nodeid] = report.outcome, reason

    def pytest_sessionfinish(self):
        self.write({feature: _cell(list(outcomes.values())) for feature, outcomes in self.outcomes.items()})


def _cell(outcomes):
    said = [outcome for outcome, _ in outcomes]
    if "failed" in said:
        return f"no: {said.count('failed')} of {len(said)} tests failed"
    if "passed" in said:
        return "yes"
    return "skipped: " + "; ".join(sorted({reason for _, reason in outcomes})) if said else "not run"
