"""Options of the whole test suite."""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
