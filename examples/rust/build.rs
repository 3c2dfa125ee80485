//! Links the core that pkg-config finds: PKG_CONFIG_PATH=<prefix>/lib/pkgconfig, or, for the one in
//! a Python package, $(python -m qlora_native --pkgconfig-dir).

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let output = Command::new("pkg-config")
        .args(["--variable=libdir", "qlora_native"])
        .output()
        .expect("pkg-config could not be run");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "pkg-config: {message}");
    let folder = String::from_utf8(output.stdout).expect("a path in UTF-8");
    let folder = folder.trim();
    println!("cargo:rustc-link-search=native={folder}");
    println!("cargo:rustc-link-lib=dylib=qlora_native");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
