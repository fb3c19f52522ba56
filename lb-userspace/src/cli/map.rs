//! `sluice map`: straight from their pins, with or without a daemon.

use super::{
    Context,
    output::{Cell, Format, Output, Stdout, Table, json},
    status,
};
use crate::{api::client::NoDaemon, config::Daemon, dataplane};
use anyhow::Result;
use serde_json::{Map, Value};
use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// The BPF maps in the kernel, read without the daemon's help.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Examples:
  sluice map list
  sluice map dump backends")]
pub(super) enum Command {
    /// List the maps and how full they are.
    #[command(after_help = "\
Examples:
  sluice map list
  sluice map list -o json")]
    List {
        #[command(flatten)]
        pins: Pins,
        #[command(flatten)]
        output: Output,
    },
    /// Print the entries of a map, fields by name. Array elements that are all zero are left out.
    #[command(after_help = "\
Examples:
  sluice map dump backends
  sluice map dump flows4 -o json | jq 'map(select(.service == 1)) | length'")]
    Dump {
        /// Name of the map, as \"sluice map list\" has it.
        name: String,
        #[command(flatten)]
        pins: Pins,
        #[command(flatten)]
        output: Output,
    },
}

/// Where the pins are.
#[derive(Debug, clap::Args)]
pub(super) struct Pins {
    /// Directory of the pins [default: the running daemon's, else /sys/fs/bpf/sluice].
    #[arg(long, value_name = "PATH")]
    pin_path: Option<PathBuf>,
}

impl Pins {
    async fn path(self, context: &Context) -> Result<PathBuf> {
        if let Some(path) = self.pin_path {
            return Ok(path);
        }
        match context.client.status().await {
            Ok(status) => {
                let path = PathBuf::from(status.pin_path);
                let pid = context.client.daemon_pid().await?;
                Ok(pid.map_or(path.clone(), |pid| as_seen_by(pid, &path)))
            }
            Err(error) if error.is::<NoDaemon>() => Ok(Daemon::PIN_PATH.into()),
            Err(error) => Err(error),
        }
    }
}

/// `path` as process `pid` sees it. A daemon that "ip netns exec" started has a BPF file system of
/// its own, since that command gives it a new /sys.
fn as_seen_by(pid: i32, path: &Path) -> PathBuf {
    let mounts = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    match (mounts("self"), mounts(&pid.to_string())) {
        (Ok(own), Ok(its)) if own != its => {
            let root = PathBuf::from(format!("/proc/{pid}/root"));
            root.join(path.strip_prefix("/").unwrap_or(path))
        }
        _ => path.to_owned(),
    }
}

impl Command {
    pub(super) async fn run(self, context: &Context) -> Result<String> {
        match self {
            Self::List { pins, output } => {
                let maps = dataplane::list(&pins.path(context).await?)?;
                match output.format {
                    Format::Json => json(&maps),
                    format => {
                        Ok(status::maps(&maps, format == Format::Wide).render(context.colour))
                    }
                }
            }
            Self::Dump { name, pins, output } => {
                let path = pins.path(context).await?;
                let mut stdout = Stdout::new();
                match output.format {
                    Format::Json => {
                        let mut array = Array::new(&mut stdout);
                        dataplane::dump(&path, &name, &mut |entry| array.entry(&entry))?;
                        array.end()?;
                    }
                    Format::Table | Format::Wide => {
                        let mut rows = Rows::new(&mut stdout);
                        dataplane::dump(&path, &name, &mut |entry| rows.entry(entry))?;
                        rows.end()?;
                    }
                }
                stdout.flush()?;
                Ok(String::new())
            }
        }
    }
}

/// A JSON array that is written as its entries come: a flow table is too large to be held.
struct Array<W> {
    out: W,
    separator: &'static str,
}

impl<W: io::Write> Array<W> {
    const fn new(out: W) -> Self {
        Self {
            out,
            separator: "[\n  ",
        }
    }

    fn entry(&mut self, entry: &Value) -> io::Result<()> {
        write!(self.out, "{}{entry}", self.separator)?;
        self.separator = ",\n  ";
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        // Nothing has been opened where there was no entry.
        let end = if self.separator.starts_with('[') {
            "[]\n"
        } else {
            "\n]\n"
        };
        self.out.write_all(end.as_bytes())
    }
}

/// Rows that are aligned before the next are read.
const CHUNK: usize = 1000;

/// A table that is written as its entries come, a chunk at a time.
struct Rows<W> {
    out: W,
    columns: Vec<String>,
    chunk: Vec<Map<String, Value>>,
    widths: Vec<usize>,
    headed: bool,
}

impl<W: io::Write> Rows<W> {
    fn new(out: W) -> Self {
        let (columns, chunk, widths) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            out,
            columns,
            chunk,
            widths,
            headed: false,
        }
    }

    fn entry(&mut self, entry: Value) -> io::Result<()> {
        if let Value::Object(fields) = entry {
            self.chunk.push(fields);
        }
        if self.chunk.len() < CHUNK {
            Ok(())
        } else {
            self.write()
        }
    }

    fn end(mut self) -> io::Result<()> {
        if self.chunk.is_empty() && !self.headed {
            return self.out.write_all(b"no entries\n");
        }
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        // The entries of a map need not have the same fields: those of a flow's two directions
        // differ. A field that turns up late gives a new heading.
        for (name, value) in self.chunk.iter().flatten() {
            let title = if value.is_number() {
                format!(">{name}")
            } else {
                name.clone()
            };
            if !self
                .columns
                .iter()
                .any(|column| column.trim_start_matches('>') == name)
            {
                self.columns.push(title);
                self.headed = false;
            }
        }
        let mut table = Table::new(self.columns.iter().map(String::as_str));
        for fields in self.chunk.drain(..) {
            let cell = |column: &String| field(fields.get(column.trim_start_matches('>')));
            table.row(self.columns.iter().map(cell).collect());
        }
        let text = table.render_part(&mut self.widths, !self.headed);
        self.headed = true;
        self.out.write_all(text.as_bytes())
    }
}

fn field(value: Option<&Value>) -> Cell {
    match value {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => text.as_str().into(),
        Some(Value::Bool(yes)) => (if *yes { "yes" } else { "no" }).into(),
        Some(other) => other.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn entries_become_a_table_with_every_field_there_is() {
        let mut text = Vec::new();
        let mut rows = Rows::new(&mut text);
        rows.entry(json!({"backend": 1, "address": "10.0.0.11", "alive": true}))
            .unwrap();
        rows.entry(json!({"backend": 20, "address": "10.0.0.9", "alive": false, "name": null}))
            .unwrap();
        rows.end().unwrap();
        let expected = "\
backend  address    alive  name
      1  10.0.0.11  yes    -
     20  10.0.0.9   no     -
";
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }

    #[test]
    fn a_long_table_has_one_heading_and_stays_aligned() {
        let mut text = Vec::new();
        let mut rows = Rows::new(&mut text);
        for slot in 0..CHUNK as u64 * 3 {
            rows.entry(json!({"slot": 100_000 - slot, "backend": 1}))
                .unwrap();
        }
        rows.end().unwrap();
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.lines().count(), CHUNK * 3 + 1);
        assert_eq!(text.matches("slot").count(), 1);
        assert!(
            text.lines()
                .all(|line| line.len() == "  slot  backend".len()),
            "{text}"
        );
    }

    #[test]
    fn a_field_that_turns_up_late_gives_a_new_heading() {
        let mut text = Vec::new();
        let mut rows = Rows::new(&mut text);
        for _ in 0..CHUNK {
            rows.entry(json!({"slot": 1})).unwrap();
        }
        rows.entry(json!({"slot": 2, "late": "x"})).unwrap();
        rows.end().unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("slot  late\n   2  x\n"), "{text}");
    }

    #[test]
    fn json_is_an_array_however_many_entries_there_are() {
        for entries in [
            vec![],
            vec![json!({"a": 1})],
            vec![json!({"a": 1}), json!({"b": [2]})],
        ] {
            let mut text = Vec::new();
            let mut array = Array::new(&mut text);
            for entry in &entries {
                array.entry(entry).unwrap();
            }
            array.end().unwrap();
            assert_eq!(
                serde_json::from_slice::<Vec<Value>>(&text).unwrap(),
                entries
            );
            assert!(text.ends_with(b"]\n"));
        }
    }
}
