//! `sluice completions` and `sluice man`: what the definition of the command line gives for free.

use super::Cli;
use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_complete::Shell;
use std::{fs, path::PathBuf};

/// Print a completion script.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sluice completions bash | sudo tee /usr/share/bash-completion/completions/sluice
  sluice completions zsh > ~/.zfunc/_sluice
  sluice completions fish > ~/.config/fish/completions/sluice.fish")]
pub(super) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> String {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "sluice", &mut script);
        String::from_utf8_lossy(&script).into_owned()
    }
}

/// Print the manual page, or write the pages of all commands.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sluice man | man -l -
  sudo sluice man --dir /usr/local/share/man/man1")]
pub(super) struct Man {
    /// Write a page for each command into this directory, which must exist.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Man {
    pub(super) fn run(self) -> Result<String> {
        let Some(directory) = self.dir else {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command())
                .render(&mut page)
                .context("cannot write the page")?;
            return Ok(String::from_utf8_lossy(&page).into_owned());
        };
        let shown = directory.display();
        let is_directory =
            fs::metadata(&directory).with_context(|| format!("{shown}: cannot look at it"))?;
        anyhow::ensure!(is_directory.is_dir(), "{shown}: not a directory");
        clap_mangen::generate_to(Cli::command(), &directory)
            .with_context(|| format!("{shown}: cannot write the manual pages"))?;
        Ok(String::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_gets_a_script_that_knows_the_nouns() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = Completions { shell }.run();
            for noun in ["service", "backend", "conn", "stats", "status"] {
                assert!(script.contains(noun), "{shell}: {noun}");
            }
        }
    }

    #[test]
    fn the_manual_page_lists_the_commands() {
        let page = Man { dir: None }.run().unwrap();
        assert!(page.contains(".TH sluice 1"), "{page}");
        assert!(page.contains("sluice\\-service(1)"), "{page}");
    }
}
