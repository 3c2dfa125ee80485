"""What cpack makes: an archive of the prefix, and two Debian packages."""

from __future__ import annotations

import pytest

from _prefix import ABI, LIMIT_S, ROOT, VERSION, build_project, need, run

pytestmark = pytest.mark.timeout(LIMIT_S)

RUNTIME, DEVELOPMENT = f"libqlora-native{ABI}", "libqlora-native-dev"


@pytest.fixture(scope="module")
def packages(core, tmp_path_factory):
    """Return the folder with everything that cpack has made."""
    need("cpack")
    folder = tmp_path_factory.mktemp("packages")
    run("cpack", "-B", folder, cwd=core)
    return folder


@pytest.fixture
def debian(packages):
    """Return the Debian packages by name."""
    need("dpkg-deb", "dpkg-shlibdeps")
    return {run("dpkg-deb", "-f", deb, "Package").strip(): deb for deb in packages.glob("*.deb")}


def paths(deb) -> list[str]:
    """Return the files and links in a package, without folders."""
    listed = [line.split()[5].removeprefix(".") for line in run("dpkg-deb", "-c", deb).splitlines()]
    return [path for path in listed if not path.endswith("/")]


def test_the_archive_is_a_prefix(packages, tmp_path):
    (archive,) = packages.glob("*.tar.gz")
    assert archive.name.startswith(f"qlora_native-{VERSION}-")
    run("tar", "-xzf", archive, "-C", tmp_path)
    (prefix,) = tmp_path.iterdir()
    build_project(
        ROOT / "examples/cpp/quickstart", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"
    )
    assert "relative error" in run(tmp_path / "build" / "quickstart")


def test_the_debian_packages_say_what_they_are(debian):
    assert set(debian) == {RUNTIME, DEVELOPMENT}
    field = {
        name: {
            key: run("dpkg-deb", "-f", deb, key).strip()
            for key in ("Version", "Depends", "Section", "Architecture", "Maintainer")
        }
        for name, deb in debian.items()
    }
    runtime, development = field[RUNTIME], field[DEVELOPMENT]
    assert runtime["Version"] == development["Version"] == f"{VERSION}-1"
    assert runtime["Section"] == "libs"
    assert development["Section"] == "libdevel"
    for library in ("libc6 (>= ", "libstdc++6 (>= "):
        assert library in runtime["Depends"]
    assert development["Depends"] == f"{RUNTIME} (= {VERSION}-1)"
    assert runtime["Architecture"] == run("dpkg", "--print-architecture").strip()
    assert debian[RUNTIME].name.startswith(f"{RUNTIME}_{VERSION}-1_")


def test_the_debian_packages_hold_the_files_once(debian):
    runtime, development = paths(debian[RUNTIME]), paths(debian[DEVELOPMENT])
    assert runtime == [f"/usr/lib/libqlora_native.so.{number}" for number in (ABI, VERSION)]
    assert not set(runtime) & set(development)
    for path in (
        "/usr/include/qlora_native/c_api.h",
        "/usr/lib/cmake/qlora_native/qlora_nativeConfig.cmake",
        "/usr/lib/libqlora_native.a",
        "/usr/lib/libqlora_native.so",
        "/usr/lib/pkgconfig/qlora_native.pc",
    ):
        assert path in development


def test_the_runtime_package_says_what_provides_its_soname(debian):
    control = debian[RUNTIME].parent / "control"
    run("dpkg-deb", "-e", debian[RUNTIME], control)
    shlibs = (control / "shlibs").read_text()
    assert shlibs.strip() == f"libqlora_native {ABI} {RUNTIME} (= {VERSION}-1)"
    assert "ldconfig" in (control / "triggers").read_text()


def test_a_program_builds_against_the_installed_debian_packages(debian, tmp_path):
    for deb in debian.values():
        run("dpkg-deb", "-x", deb, tmp_path / "system")
    prefix = tmp_path / "system" / "usr"
    build = tmp_path / "build"
    build_project(ROOT / "examples/cpp/quickstart", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert "relative error" in run(build / "quickstart")
