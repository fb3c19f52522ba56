//! `cargo xtask bench` measures what it says, and writes what scripts can read. How long anything takes is nobody's concern here.

use serde_json::{Map, Value};
use sluice_tests::topology::sluice_bin;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

type Row = Map<String, Value>;

/// A folder for results that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        Self(place.join(format!("bench-{}-{name}", std::process::id())))
    }

    fn results(&self, name: &str) -> Vec<Row> {
        let file = self.0.join(name);
        let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}: {text}", file.display()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the program and returns what it prints.
fn bench(folder: &Folder, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-bench"));
    // CPU time is counted for its process group, so it must be alone there.
    command
        .process_group(0)
        .env("SLUICE_BENCH_OUT", &folder.0)
        .args(arguments);
    if ["end-to-end", "failover"].contains(&arguments[0]) {
        command.env("SLUICE_BIN", sluice_bin());
    }
    let output = command.output().expect("the program starts");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{arguments:?} ends with {}\n{stdout}{stderr}",
        output.status
    );
    stdout
}

/// Every result is one flat object that says where it was measured.
fn assert_sane(rows: &[Row]) {
    for row in rows {
        for (name, value) in row {
            assert!(
                !value.is_object() && !value.is_array(),
                "{name} is not flat: {row:?}"
            );
        }
        for name in ["case", "part", "kernel", "cpu", "commit", "date"] {
            assert!(
                row.get(name)
                    .and_then(Value::as_str)
                    .is_some_and(|text| !text.is_empty() || name == "commit"),
                "no {name}: {row:?}"
            );
        }
        assert!(row["cores"].as_u64() > Some(0), "no cores: {row:?}");
        assert!(!row.contains_key("failure"), "{row:?}");
    }
}

#[test]
fn packets_are_measured_and_the_program_does_what_the_case_says() {
    let folder = Folder::new("packets");
    let only = [
        "--only",
        "dsr v4 tcp maglev established 1",
        "--only",
        "not ours unwrapped v4",
    ];
    let printed = bench(&folder, &[&["packets", "--quick"], &only[..]].concat());
    let rows = folder.results("packets.json");
    assert_sane(&rows);
    let names: Vec<&str> = rows.iter().filter_map(|row| row["case"].as_str()).collect();
    assert_eq!(
        names,
        [
            "not ours unwrapped v4",
            "dsr v4 tcp maglev established 1",
            "floor tx",
            "floor mac-swap",
            "floor grow",
            "floor tx unwrapped"
        ]
    );
    for row in &rows {
        let number = |name: &str| {
            row[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {row:?}"))
        };
        assert!(number("min_ns") > 0.0, "{row:?}");
        assert!(number("median_ns") >= number("min_ns"), "{row:?}");
        assert!(printed.contains(row["case"].as_str().unwrap()), "{printed}");
    }

    // The same again, compared with itself.
    let file = folder.0.join("before.json");
    fs::rename(folder.0.join("packets.json"), &file).unwrap();
    let baseline = ["--baseline", file.to_str().unwrap()];
    let printed = bench(
        &folder,
        &[&["packets", "--quick"], &only[..2], &baseline].concat(),
    );
    let change = printed.lines().find(|line| {
        line.starts_with("dsr v4 tcp maglev established 1") && line.contains("min_ns")
    });
    assert!(change.is_some_and(|line| line.ends_with('%')), "{printed}");
}

/// The one result of a part that was asked for one case.
fn only(part: &str, case: &str) -> Row {
    let folder = Folder::new(&case.replace(' ', "-"));
    bench(&folder, &[part, "--quick", "--only", case]);
    let mut rows = folder.results(&format!("{part}.json"));
    assert_sane(&rows);
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.remove(0)
}

#[test]
fn requests_through_the_balancer_are_counted() {
    let row = only("end-to-end", "http sluice nat");
    for name in [
        "requests_per_second",
        "connections_per_second",
        "latency_p99_us",
    ] {
        assert!(row[name].as_f64() > Some(0.0), "{name}: {row:?}");
    }
}

#[test]
fn packets_go_through_the_whole_path() {
    let row = only("end-to-end", "live sluice dsr");
    assert!(
        row["packets_per_second_and_core"].as_f64() > Some(0.0),
        "{row:?}"
    );
    assert!(row["lost_percent"].as_f64() < Some(50.0), "{row:?}");
}

#[test]
fn a_table_is_measured() {
    let row = only("control-plane", "table 100 backends");
    assert_eq!(row["slots"], 65521, "{row:?}");
    assert!(
        row["moved_percent_when_one_goes"].as_f64() < Some(0.6),
        "{row:?}"
    );
}

#[test]
fn clients_of_a_dead_backend_find_another() {
    let row = only("failover", "process death 200");
    assert!(
        row["first_answer_median_ms"].as_f64() > Some(0.0),
        "{row:?}"
    );
}

#[test]
fn cases_have_names_of_their_own() {
    let folder = Folder::new("names");
    for size in [
        &["packets", "--list"][..],
        &["packets", "--list", "--quick"],
    ] {
        let printed = bench(&folder, size);
        let names: BTreeSet<&str> = printed.lines().collect();
        assert!(names.len() > 100, "{printed}");
        assert_eq!(names.len(), printed.lines().count(), "a name comes twice");
    }
}
