//! Results: flat JSON objects, one for each case.

use crate::machine;
use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};
use std::{fs, path::Path};

/// The results of one part.
pub struct Report {
    machine: Map<String, Value>,
    rows: Vec<Map<String, Value>>,
}

impl Report {
    /// Without results yet.
    pub fn new() -> Self {
        Self {
            machine: machine::describe(),
            rows: Vec::new(),
        }
    }

    /// Adds a result. `case` names it in comparisons; a member `failure` says what was wrong with it.
    pub fn add(&mut self, case: &str, members: Value) {
        let mut row = Map::new();
        row.insert("case".to_owned(), json!(case));
        if let Value::Object(members) = members {
            row.extend(members);
        }
        row.extend(self.machine.clone());
        self.rows.push(row);
    }

    /// A number of the result of this name; NaN if there is none.
    pub fn number(&self, case: &str, member: &str) -> f64 {
        let row = self.rows.iter().find(|row| row["case"] == case);
        row.and_then(|row| row.get(member)?.as_f64())
            .unwrap_or(f64::NAN)
    }

    /// Number of results.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Number of results that are not what they should be.
    pub fn failures(&self) -> usize {
        let failed = |row: &&Map<String, Value>| row.contains_key("failure");
        self.rows.iter().filter(failed).count()
    }

    /// Writes all results as one array.
    pub fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.rows)?;
        fs::write(file, text + "\n").with_context(|| file.display().to_string())
    }

    /// Prints how the numbers differ from those of an earlier run.
    pub fn compare(&self, baseline: &[Map<String, Value>]) {
        println!(
            "\n{:<52} {:<22} {:>12} {:>12} {:>8}",
            "case", "measure", "before", "now", "change"
        );
        for row in &self.rows {
            let Some(before) = baseline.iter().find(|before| before["case"] == row["case"]) else {
                continue;
            };
            for (name, now) in row {
                let Some((now, before)) = measure(name, now, before.get(name)) else {
                    continue;
                };
                println!(
                    "{:<52} {name:<22} {before:>12.1} {now:>12.1} {:>+7.1}%",
                    row["case"].as_str().unwrap_or_default(),
                    (now / before - 1.0) * 100.0
                );
            }
        }
    }
}

/// The two values of a member that was measured; what a case was given has no decimal point.
fn measure(name: &str, now: &Value, before: Option<&Value>) -> Option<(f64, f64)> {
    let measured = now.is_f64() && name != "floor_ns";
    Some((measured.then(|| now.as_f64())??, before?.as_f64()?))
}

/// The results of an earlier run.
pub fn read(file: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a result of this", file.display()))
}
