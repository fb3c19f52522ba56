//! The command line: a file for each noun.
//!
//! A command returns the text it prints. Exit status: 0 done, 1 refused or failed (one line on
//! standard error), 2 wrong usage.

use crate::{api::client::Client, config::Daemon};
use anyhow::{Context as _, Result};
use clap::{
    CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind,
    parser::ValueSource,
};
use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

mod backend;
mod config;
mod conn;
mod decap;
mod demo;
mod detach;
mod generate;
mod map;
mod output;
mod run;
mod service;
mod stats;
mod status;
mod stop;

/// Layer-4 load balancer for Linux on XDP: daemon and command line.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  sluice config check /etc/sluice/sluice.toml
  sudo sluice run --config /etc/sluice/sluice.toml
  sluice backend list web
  sluice stats --rate
  sluice conn list --client 192.0.2.0/24 -o json

A service is addressed by its name or by VIP:port/protocol, such as 198.51.100.10:80/tcp.
Exit status: 0 done, 1 refused or failed, 2 wrong usage.")]
struct Cli {
    /// Control socket of the daemon [default: /run/sluice/control.sock].
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "SLUICE_SOCKET",
        display_order = 100
    )]
    socket: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Stop(stop::Args),
    Detach(detach::Args),
    #[command(subcommand)]
    Config(config::Command),
    #[command(subcommand)]
    Service(service::Command),
    #[command(subcommand)]
    Backend(backend::Command),
    #[command(subcommand)]
    Conn(conn::Command),
    Stats(stats::Args),
    Status(status::Args),
    #[command(subcommand)]
    Map(map::Command),
    Decap(decap::Args),
    Demo(demo::Args),
    #[command(name = crate::demo::SUBCOMMAND, hide = true)]
    DemoBackend(demo::Backend),
    Completions(generate::Completions),
    Man(generate::Man),
}

/// What the commands that ask the daemon share.
struct Context {
    client: Client,
    /// Whether the operator has said which control socket.
    socket_given: bool,
    /// Whether standard output understands colours.
    colour: bool,
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = parse(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let result = run(cli).and_then(|text| print(&text));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done when standard error is closed as well.
            let _ = writeln!(io::stderr(), "sluice: {}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    let cli = Cli::from_arg_matches(&matches)?;
    // The variable is for the clients and does no harm; the option would be ignored.
    if matches!(cli.command, Command::Run(_))
        && matches.value_source("socket") == Some(ValueSource::CommandLine)
    {
        let message = "the daemon's control socket is set by daemon.socket in its configuration, not by --socket";
        return Err(Cli::command().error(ErrorKind::ArgumentConflict, message));
    }
    Ok(cli)
}

fn run(cli: Cli) -> Result<String> {
    let context = Context {
        socket_given: cli.socket.is_some(),
        client: Client::new(cli.socket.unwrap_or_else(|| Daemon::SOCKET.into())),
        colour: wants_colour(
            io::stdout().is_terminal(),
            std::env::var_os("NO_COLOR").as_deref(),
            std::env::var_os("TERM").as_deref(),
        ),
    };
    match cli.command {
        Command::Run(args) => args.run().map(|()| String::new()),
        Command::Stop(args) => wait(args.run(&context)),
        Command::Detach(args) => wait(args.run(context)),
        Command::Config(command) => command.run(),
        Command::Service(command) => wait(command.run(&context)),
        Command::Backend(command) => wait(command.run(&context)),
        Command::Conn(command) => wait(command.run(&context)),
        Command::Stats(args) => wait(args.run(&context)),
        Command::Status(args) => wait(args.run(&context)),
        Command::Map(command) => wait(command.run(&context)),
        Command::Decap(args) => wait(args.run(context.colour)),
        Command::Demo(args) => args.run().map(|()| String::new()),
        Command::DemoBackend(args) => wait(args.run()).map(|()| String::new()),
        Command::Completions(args) => Ok(args.run()),
        Command::Man(args) => args.run(),
    }
}

/// Runs a command that speaks to the daemon.
fn wait<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")?
        .block_on(command)
}

fn print(text: &str) -> Result<()> {
    let mut stdout = output::Stdout::new();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// See <https://no-color.org>: any value but the empty one turns colours off.
fn wants_colour(terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty) && term.is_none_or(|term| term != "dumb")
}

/// Folds line breaks and replaces other control characters, so that an error is one line whatever
/// it quotes.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        let gap = if line.is_empty() { "" } else { " " };
        let _ = write!(line, "{gap}{}", output::printable(part));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_daemon_refuses_a_socket_that_it_would_ignore() {
        for line in [
            "sluice run --config sluice.toml --socket /run/other.sock",
            "sluice --socket /run/other.sock run --config sluice.toml",
        ] {
            let error = parse(line.split(' ').map(OsString::from)).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("daemon.socket"), "{error}");
        }
        assert!(
            parse(
                "sluice run --config sluice.toml"
                    .split(' ')
                    .map(OsString::from)
            )
            .is_ok()
        );
    }

    #[test]
    fn the_help_names_the_default_socket() {
        let command = Cli::command();
        let socket = command
            .get_arguments()
            .find(|a| a.get_id() == "socket")
            .unwrap();
        let help = socket.get_help().unwrap().to_string();
        assert!(
            help.contains(&format!("[default: {}]", Daemon::SOCKET)),
            "{help}"
        );
    }

    #[test]
    fn every_command_has_examples() {
        fn visit(command: &clap::Command, path: &str) {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.starts_with("Examples:\n  "), "{path}");
            assert!(
                help.contains(path),
                "the examples of {path:?} do not use it"
            );
            assert!(command.get_about().is_some(), "{path}: no description");
            let shown = |sub: &&clap::Command| sub.get_name() != "help" && !sub.is_hide_set();
            for sub in command.get_subcommands().filter(shown) {
                visit(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        visit(&Cli::command(), "sluice");
    }

    #[test]
    fn colour_is_for_terminals_whose_owner_wants_it() {
        let text = |s: &'static str| Some(OsStr::new(s));
        assert!(wants_colour(true, None, text("xterm")));
        assert!(wants_colour(true, text(""), None));
        assert!(!wants_colour(false, None, text("xterm")));
        assert!(!wants_colour(true, text("1"), text("xterm")));
        assert!(!wants_colour(true, None, text("dumb")));
    }

    #[test]
    fn errors_become_one_line() {
        assert_eq!(one_line("first\n  second\r\n\nthird"), "first second third");
        assert!(!one_line("a\u{1b}[31mb").contains('\u{1b}'));
    }
}
