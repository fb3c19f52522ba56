//! Section `[service.health]` and `[service.backend.health]`: how backends are checked.

use super::{
    Backend, Error, Protocol,
    read::{At, Entry, Section, closest, quote},
    tls::{self, Tls},
    value::{self, Human},
};
use hickory_proto::{
    op::ResponseCode,
    rr::{Name, RecordType},
};
use regex::bytes::{Regex, RegexBuilder};
use std::{ffi::CString, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(500);
const RISE: u32 = 2;
const FALL: u32 = 3;
const COUNT_MAX: u32 = 65_535;
const FLAP_LIMIT: u32 = 4;
const FLAP_WINDOW: Duration = Duration::from_secs(600);
const EJECT_AFTER: u32 = 5;
const EJECT_TIME: Duration = Duration::from_secs(10);
const JITTER: u32 = 10;
const JITTER_MAX: u32 = 50;
const STATUS: (u16, u16) = (100, 599);
const EXPECT: (u16, u16) = (200, 399);
/// Largest payload of a UDP datagram over IPv4 (RFC 768: 65535 less both headers).
const PAYLOAD_MAX: usize = 65_507;
const COMMAND_USER: &str = "nobody";

/// How one backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is asked.
    pub check: Check,
    /// Port to ask at instead of the backend's own.
    pub port: Option<u16>,
    /// Time from the start of one check to the start of the next.
    pub interval: Duration,
    /// The same while results contradict the state, or nothing is known yet.
    pub fast_interval: Duration,
    /// The same while the backend is down.
    pub down_interval: Duration,
    /// Percent by which each interval varies at random, up and down.
    pub jitter: u32,
    /// Time a check may take.
    pub timeout: Duration,
    /// Successes in a row that bring a backend up.
    pub rise: u32,
    /// Failures in a row that take it down.
    pub fall: u32,
    /// What a backend counts as before its first check.
    pub start: Start,
    /// How often a backend may go down within `flap_window` before `rise` grows; 0: as often as it
    /// likes.
    pub flap_limit: u32,
    /// See `flap_limit`.
    pub flap_window: Duration,
    /// Connections that a backend may leave unanswered or refuse within two seconds before it is
    /// ejected; 0: as many as it likes.
    pub eject_after: u32,
    /// For how long it is ejected the first time.
    pub eject_time: Duration,
    /// How the backend's agent is asked beside the check.
    pub agent: Option<Arc<Health>>,
}

impl Default for Health {
    /// No check.
    fn default() -> Self {
        Self {
            check: Check::None,
            port: None,
            interval: INTERVAL,
            fast_interval: INTERVAL,
            down_interval: INTERVAL,
            jitter: JITTER,
            timeout: TIMEOUT,
            rise: RISE,
            fall: FALL,
            start: Start::Unknown,
            flap_limit: FLAP_LIMIT,
            flap_window: FLAP_WINDOW,
            eject_after: EJECT_AFTER,
            eject_time: EJECT_TIME,
            agent: None,
        }
    }
}

/// What a backend counts as before its first check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// Nothing: it takes no flows, and its first result decides.
    #[default]
    Unknown,
    /// Up, until as many checks failed as `fall` says.
    Up,
    /// Down, until as many checks succeeded as `rise` says.
    Down,
}

/// What a health check asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing: the backend counts as up.
    None,
    /// A TCP connection.
    Tcp,
    /// A TCP connection and a TLS handshake.
    Tls(Tls),
    /// An HTTP/1.1 request that must be answered with an expected status; over TLS where there is one.
    Http(Box<Http>, Option<Tls>),
    /// A datagram.
    Udp(Udp),
    /// A question to a name server, over UDP.
    Dns(Dns),
    /// `grpc.health.v1.Health/Check` over HTTP/2 without TLS.
    Grpc(Grpc),
    /// A program of the operator's.
    Exec(Box<Exec>),
    /// A line from the backend's agent.
    Agent,
}

/// The request of an HTTP check, and the answer it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// Method.
    pub method: String,
    /// Path, with query if any.
    pub path: String,
    /// `Host` header; `None`: the backend's address.
    pub host: Option<String>,
    /// Inclusive ranges of good status codes.
    pub expect: Vec<(u16, u16)>,
    /// What the body must match.
    pub body: Option<Pattern>,
}

/// A UDP check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Udp {
    /// What is sent.
    pub payload: Vec<u8>,
    /// What the answer must match.
    pub answer: Option<Pattern>,
    /// Whether silence is a failure.
    pub must_answer: bool,
}

/// A DNS check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Whom is asked for.
    pub name: Name,
    /// Type of the records asked for.
    pub record: RecordType,
    /// Good response codes.
    pub rcodes: Vec<ResponseCode>,
}

/// A gRPC check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    /// Name of the gRPC service that is asked for; empty: the server as a whole.
    pub service: String,
    /// `:authority`; `None`: the backend's address.
    pub host: Option<String>,
}

/// A check that runs a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    /// The program, by its absolute path.
    pub command: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Whom it runs as.
    pub user: User,
}

/// A user of this system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// User number.
    pub uid: u32,
    /// Number of the user's own group.
    pub gid: u32,
}

/// A regular expression over bytes; `^` and `$` match at the ends of lines.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl Pattern {
    /// Whether it is found in `bytes`.
    #[must_use]
    pub fn is_in(&self, bytes: &[u8]) -> bool {
        self.0.is_match(bytes)
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // An answer often ends with a line break, which $ alone would not see past.
        let regex = RegexBuilder::new(text).multi_line(true).build();
        regex.map(Self).map_err(|error| {
            let error = error.to_string();
            let last = error.lines().last().unwrap_or_default();
            format!(
                "is not a regular expression: {}; see https://docs.rs/regex for the syntax",
                last.trim_start_matches("error: ")
            )
        })
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Pattern {}

impl Check {
    /// The word for it in the configuration.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => Kind::None,
            Self::Tcp => Kind::Tcp,
            Self::Tls(_) => Kind::Tls,
            Self::Http(_, None) => Kind::Http,
            Self::Http(_, Some(_)) => Kind::Https,
            Self::Udp(_) => Kind::Udp,
            Self::Dns(_) => Kind::Dns,
            Self::Grpc(_) => Kind::Grpc,
            Self::Exec(_) => Kind::Exec,
            Self::Agent => Kind::Agent,
        }
        .name()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    None,
    Tcp,
    Tls,
    Http,
    Https,
    Udp,
    Dns,
    Grpc,
    Exec,
    Agent,
}

impl Kind {
    const WORDS: [(&'static str, Self); 10] = [
        ("none", Self::None),
        ("tcp", Self::Tcp),
        ("tls", Self::Tls),
        ("http", Self::Http),
        ("https", Self::Https),
        ("udp", Self::Udp),
        ("dns", Self::Dns),
        ("grpc", Self::Grpc),
        ("exec", Self::Exec),
        ("agent", Self::Agent),
    ];

    fn name(self) -> &'static str {
        Self::WORDS
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("", |(word, _)| word)
    }

    fn words() -> [&'static str; 10] {
        Self::WORDS.map(|(word, _)| word)
    }

    /// `a tcp check`, `an http check`.
    fn article(self) -> String {
        let name = self.name();
        let article = if name.starts_with(['a', 'e', 'h']) && self != Self::None {
            "an"
        } else {
            "a"
        };
        format!("{article} {name} check")
    }

    /// Whether it makes a TCP connection.
    const fn connects(self) -> bool {
        matches!(
            self,
            Self::Tcp | Self::Tls | Self::Http | Self::Https | Self::Grpc | Self::Agent
        )
    }

    /// Whether it asks at a port of the backend.
    const fn needs_port(self) -> bool {
        !matches!(self, Self::None | Self::Exec)
    }
}

/// Keys that only some checks use, and which.
const SPECIFIC: [(&str, &[Kind]); 21] = {
    use Kind::{Agent, Dns, Exec, Grpc, Http, Https, Tcp, Tls, Udp};
    [
        (
            "port",
            &[Tcp, Tls, Http, Https, Udp, Dns, Grpc, Exec, Agent],
        ),
        ("method", &[Http, Https]),
        ("path", &[Http, Https]),
        ("host", &[Http, Https, Grpc]),
        ("expect", &[Http, Https]),
        ("expect_body", &[Http, Https, Udp]),
        ("sni", &[Https, Tls]),
        ("verify", &[Https, Tls]),
        ("ca", &[Https, Tls]),
        ("cert", &[Https, Tls]),
        ("key", &[Https, Tls]),
        ("payload", &[Udp]),
        ("payload_hex", &[Udp]),
        ("must_answer", &[Udp]),
        ("name", &[Dns]),
        ("record", &[Dns]),
        ("rcode", &[Dns]),
        ("service", &[Grpc]),
        ("command", &[Exec]),
        ("args", &[Exec]),
        ("user", &[Exec]),
    ]
};

/// Keys that every check uses.
const GENERAL: [&str; 14] = [
    "type",
    "interval",
    "fast_interval",
    "down_interval",
    "jitter",
    "timeout",
    "rise",
    "fall",
    "start",
    "flap_limit",
    "flap_window",
    "eject_after",
    "eject_time",
    "agent_port",
];

/// The keys of one section `health`.
#[derive(Clone, Default)]
pub(super) struct HealthOptions {
    /// Every key the section has, and its place.
    written: Vec<(&'static str, usize)>,
    kind: Option<At<Kind>>,
    port: Option<At<u16>>,
    method: Option<At<String>>,
    path: Option<At<String>>,
    host: Option<At<String>>,
    expect: Option<At<Vec<(u16, u16)>>>,
    body: Option<At<Pattern>>,
    sni: Option<At<String>>,
    verify: Option<At<bool>>,
    ca: Option<At<PathBuf>>,
    cert: Option<At<PathBuf>>,
    key: Option<At<PathBuf>>,
    payload: Option<At<Vec<u8>>>,
    must_answer: Option<At<bool>>,
    name: Option<At<Name>>,
    record: Option<At<RecordType>>,
    rcodes: Option<At<Vec<ResponseCode>>>,
    service: Option<At<String>>,
    command: Option<At<PathBuf>>,
    args: Option<At<Vec<String>>>,
    user: Option<At<User>>,
    interval: Option<At<Duration>>,
    fast_interval: Option<At<Duration>>,
    down_interval: Option<At<Duration>>,
    jitter: Option<At<u32>>,
    timeout: Option<At<Duration>>,
    rise: Option<At<u32>>,
    fall: Option<At<u32>>,
    start: Option<At<Start>>,
    flap_limit: Option<At<u32>>,
    flap_window: Option<At<Duration>>,
    eject_after: Option<At<u32>>,
    eject_time: Option<At<Duration>>,
    agent_port: Option<At<u16>>,
}

impl HealthOptions {
    /// Reads table `health` of a service, a backend or `[defaults]`.
    pub(super) fn read(parent: &Section<'_>) -> Result<Self, Error> {
        let Some(section) = parent.table("health", format!("{}: health", parent.object))? else {
            return Ok(Self::default());
        };
        let known = || {
            let specific = SPECIFIC.iter().map(|(key, _)| *key);
            GENERAL.into_iter().chain(specific)
        };
        section.only(&known().collect::<Vec<_>>())?;
        let written = known()
            .filter_map(|key| Some((key, section.get(key)?.offset)))
            .collect();
        let text = |key, example: &str, check: fn(&str) -> Result<(), String>| {
            let read = |entry: Entry<'_, '_>| {
                let text = entry.text(example)?;
                check(text).map_err(|message| entry.bad(text, message))?;
                Ok(entry.at(text.to_owned()))
            };
            section.get(key).map(read).transpose()
        };
        let time = |key, example: &str| {
            let read = |entry: Entry<'_, '_>| positive(&entry, example);
            section.get(key).map(read).transpose()
        };
        let number = |key, first, last| {
            let read = |entry: Entry<'_, '_>| Ok(entry.at(entry.integer(first, last)?));
            section.get(key).map(read).transpose()
        };
        let port = |key| {
            let read = |entry: Entry<'_, '_>| {
                let number = entry.integer(1, u32::from(u16::MAX))?;
                Ok(entry.at(u16::try_from(number).unwrap_or(u16::MAX)))
            };
            section.get(key).map(read).transpose()
        };
        let flag = |key| {
            let read = |entry: Entry<'_, '_>| Ok(entry.at(entry.boolean()?));
            section.get(key).map(read).transpose()
        };
        let file = |key, example: &str| {
            let read = |entry: Entry<'_, '_>| {
                let text = entry.text(example)?;
                if !text.starts_with('/') || text.contains('\0') {
                    let message = format!("is not an absolute path, such as \"{example}\"");
                    return Err(entry.bad(text, message));
                }
                Ok(entry.at(PathBuf::from(text)))
            };
            section.get(key).map(read).transpose()
        };
        Ok(Self {
            written,
            kind: parsed(&section, "type", "http", kind)?,
            port: port("port")?,
            method: text("method", "GET", method)?,
            path: text("path", "/health", path)?,
            host: text("host", "www.example.com", host)?,
            expect: section
                .get("expect")
                .map(|entry| expect(&section, &entry))
                .transpose()?,
            body: parsed(&section, "expect_body", "\\bok\\b", Pattern::from_str)?,
            sni: text("sni", "www.example.com", tls::server_name)?,
            verify: flag("verify")?,
            ca: file("ca", "/etc/ssl/certs/ca-certificates.crt")?,
            cert: file("cert", "/etc/sluice/check.crt")?,
            key: file("key", "/etc/sluice/check.key")?,
            payload: payload(&section)?,
            must_answer: flag("must_answer")?,
            name: parsed(&section, "name", "www.example.com", dns_name)?,
            record: parsed(&section, "record", "A", record)?,
            rcodes: section
                .get("rcode")
                .map(|entry| rcodes(&section, &entry))
                .transpose()?,
            service: text("service", "my.package.Service", |_| Ok(()))?,
            command: file("command", "/usr/local/bin/check")?,
            args: section.get("args").map(|entry| args(&entry)).transpose()?,
            user: parsed(&section, "user", COMMAND_USER, user)?,
            interval: time("interval", "1s")?,
            fast_interval: time("fast_interval", "200ms")?,
            down_interval: time("down_interval", "5s")?,
            jitter: number("jitter", 0, JITTER_MAX)?,
            timeout: time("timeout", "500ms")?,
            rise: number("rise", 1, COUNT_MAX)?,
            fall: number("fall", 1, COUNT_MAX)?,
            start: parsed(&section, "start", "unknown", start)?,
            flap_limit: number("flap_limit", 0, COUNT_MAX)?,
            flap_window: time("flap_window", "10m")?,
            eject_after: number("eject_after", 0, COUNT_MAX)?,
            eject_time: time("eject_time", "10s")?,
            agent_port: port("agent_port")?,
        })
    }

    /// Whether the section is there, with any key in it.
    pub(super) fn is_written(&self) -> bool {
        !self.written.is_empty()
    }

    /// These keys, and for those that are missing what `below` says.
    pub(super) fn over(self, below: &Self) -> Self {
        macro_rules! cascade {
            ($($field:ident),*) => {
                Self { written: self.written, $($field: self.$field.or_else(|| below.$field.clone())),* }
            };
        }
        cascade!(
            kind,
            port,
            method,
            path,
            host,
            expect,
            body,
            sni,
            verify,
            ca,
            cert,
            key,
            payload,
            must_answer,
            name,
            record,
            rcodes,
            service,
            command,
            args,
            user,
            interval,
            fast_interval,
            down_interval,
            jitter,
            timeout,
            rise,
            fall,
            start,
            flap_limit,
            flap_window,
            eject_after,
            eject_time,
            agent_port
        )
    }

    fn place(&self, key: &str) -> Option<usize> {
        let found = self.written.iter().find(|(written, _)| *written == key);
        found.map(|(_, offset)| *offset)
    }

    /// Refuses what is asked of a port that is not there: `backends` are those it holds for.
    pub(super) fn check_port(
        &self,
        section: &Section<'_>,
        protocol: Protocol,
        backends: &[Backend],
    ) -> Result<(), Error> {
        let kind = self.kind();
        if !kind.needs_port() || self.port.is_some() {
            return Ok(());
        }
        let offset = self.place("type").unwrap_or(section.offset);
        let error = |message: String| {
            Err(section.error(
                offset,
                format!("health: {message}, or write type = \"none\""),
            ))
        };
        if protocol == Protocol::Udp && kind.connects() {
            return error(format!(
                "{} of a udp service needs a TCP port to ask at; add port",
                kind.article()
            ));
        }
        match backends.iter().find(|b| b.address.port() == 0) {
            Some(backend) => error(format!(
                "{} needs a port to ask at, and backend {} has none of its own; add port",
                kind.article(),
                quote(&backend.name)
            )),
            None => Ok(()),
        }
    }

    fn kind(&self) -> Kind {
        self.kind.as_ref().map_or(Kind::None, |at| at.value)
    }

    /// The check that these keys, with those of the sections above, describe. `section` is the
    /// service or backend whose own section `health` this is.
    pub(super) fn resolve(&self, section: &Section<'_>) -> Result<Health, Error> {
        let kind = self.kind();
        let error = |offset, message: String| section.error(offset, format!("health: {message}"));
        for (key, offset) in &self.written {
            let allowed = SPECIFIC.iter().find(|(specific, _)| specific == key);
            if self.kind.is_none() {
                // Nothing says what to ask, so a key that says how must be a mistake.
                let message =
                    format!("{key} without a type has no effect; add type = \"tcp\" or \"http\"");
                return Err(error(*offset, message));
            }
            // "none" may be there for the time being, with the rest left for later.
            if kind != Kind::None
                && let Some((_, kinds)) = allowed
                && !kinds.contains(&kind)
            {
                let message = format!("{key} is not for {}; remove it", kind.article());
                return Err(error(*offset, message));
            }
        }

        let (interval, timeout) = (self.interval.as_ref(), self.timeout.as_ref());
        let place = timeout.or(interval).map_or(section.offset, |at| at.offset);
        let interval = interval.map_or(INTERVAL, |at| at.value);
        let timeout = timeout.map_or_else(|| TIMEOUT.min(interval), |at| at.value);
        if interval < timeout {
            let message = format!(
                "timeout {} is longer than interval {}; choose an interval of at least {}",
                Human(timeout),
                Human(interval),
                Human(timeout)
            );
            return Err(error(place, message));
        }
        let fast_interval = value_or(&self.fast_interval, interval);
        if let Some(at) = &self.fast_interval
            && at.value > interval
        {
            let message = format!(
                "fast_interval {} is longer than interval {}; choose at most {}",
                Human(at.value),
                Human(interval),
                Human(interval)
            );
            return Err(error(at.offset, message));
        }
        let down_interval = value_or(&self.down_interval, interval);
        let health = Health {
            check: self.check(section, kind)?,
            port: self.port.as_ref().map(|at| at.value),
            interval,
            fast_interval,
            down_interval,
            jitter: value_or(&self.jitter, JITTER),
            timeout,
            rise: value_or(&self.rise, RISE),
            fall: value_or(&self.fall, FALL),
            start: value_or(&self.start, Start::Unknown),
            flap_limit: value_or(&self.flap_limit, FLAP_LIMIT),
            flap_window: value_or(&self.flap_window, FLAP_WINDOW),
            eject_after: value_or(&self.eject_after, EJECT_AFTER),
            eject_time: value_or(&self.eject_time, EJECT_TIME),
            agent: None,
        };
        if let Some(at) = &self.agent_port
            && kind == Kind::Agent
        {
            let message =
                "agent_port is for an agent beside another check; remove it, port is enough";
            return Err(error(at.offset, message.to_owned()));
        }
        let agent = self.agent_port.as_ref().map(|at| {
            Arc::new(Health {
                check: Check::Agent,
                port: Some(at.value),
                ..health.clone()
            })
        });
        Ok(Health { agent, ..health })
    }

    fn check(&self, section: &Section<'_>, kind: Kind) -> Result<Check, Error> {
        let missing = |key: &str, remedy: &str| {
            let offset = self.kind.as_ref().map_or(section.offset, |at| at.offset);
            let message = format!("health: {} needs {key}; {remedy}", kind.article());
            section.error(offset, message)
        };
        Ok(match kind {
            Kind::None => Check::None,
            Kind::Tcp => Check::Tcp,
            Kind::Agent => Check::Agent,
            Kind::Tls => Check::Tls(self.tls(section, &[])?),
            Kind::Http => Check::Http(Box::new(self.http()), None),
            Kind::Https => Check::Http(
                Box::new(self.http()),
                Some(self.tls(section, &["http/1.1"])?),
            ),
            Kind::Udp => Check::Udp(Udp {
                payload: value_or(&self.payload, Vec::new()),
                answer: self.body.as_ref().map(|at| at.value.clone()),
                must_answer: value_or(&self.must_answer, true),
            }),
            Kind::Dns => Check::Dns(Dns {
                name: self
                    .name
                    .as_ref()
                    .ok_or_else(|| missing("a name", "write name = \"www.example.com\""))?
                    .value
                    .clone(),
                record: value_or(&self.record, RecordType::A),
                rcodes: value_or(&self.rcodes, vec![ResponseCode::NoError]),
            }),
            Kind::Grpc => Check::Grpc(Grpc {
                service: value_or(&self.service, String::new()),
                host: self.host.as_ref().map(|at| at.value.clone()),
            }),
            Kind::Exec => Check::Exec(Box::new(Exec {
                command: self
                    .command
                    .as_ref()
                    .ok_or_else(|| {
                        missing("a command", "write command = \"/usr/local/bin/check\"")
                    })?
                    .value
                    .clone(),
                args: value_or(&self.args, Vec::new()),
                user: match &self.user {
                    Some(at) => at.value.clone(),
                    None => user(COMMAND_USER).map_err(|_| {
                        missing("a user", "there is none called nobody here, so write user")
                    })?,
                },
            })),
        })
    }

    fn http(&self) -> Http {
        Http {
            method: value_or(&self.method, "GET".to_owned()),
            path: value_or(&self.path, "/".to_owned()),
            host: self.host.as_ref().map(|at| at.value.clone()),
            expect: value_or(&self.expect, vec![EXPECT]),
            body: self.body.as_ref().map(|at| at.value.clone()),
        }
    }

    /// Reads the files that a check over TLS needs.
    fn tls(&self, section: &Section<'_>, alpn: &[&str]) -> Result<Tls, Error> {
        let refuse = |at: usize, message: &str| section.error(at, format!("health: {message}"));
        let verify = match (&self.verify, &self.ca) {
            (Some(at), None) if at.value => {
                return Err(refuse(
                    at.offset,
                    "verify needs the authorities to trust; write \
                     ca = \"/etc/ssl/certs/ca-certificates.crt\" for those of the system",
                ));
            }
            (Some(at), Some(_)) if !at.value => {
                return Err(refuse(
                    at.offset,
                    "verify = false leaves ca without effect; remove one",
                ));
            }
            (_, ca) => ca.is_some(),
        };
        if verify && self.sni.is_none() && self.host.is_none() {
            let at = self.ca.as_ref().map_or(section.offset, |at| at.offset);
            return Err(refuse(
                at,
                "verify needs the name in the certificate; add sni = \"www.example.com\"",
            ));
        }
        match (&self.cert, &self.key) {
            (Some(at), None) => return Err(refuse(at.offset, "cert needs its key; add key")),
            (None, Some(at)) => return Err(refuse(at.offset, "key needs its cert; add cert")),
            _ => {}
        }
        let read = |file: &Option<At<PathBuf>>, key: &str| -> Result<Vec<u8>, Error> {
            let Some(at) = file else {
                return Ok(Vec::new());
            };
            std::fs::read(&at.value).map_err(|error| {
                let file = at.value.display();
                let message =
                    format!("{key} {file} cannot be read: {error}; check path and permissions");
                refuse(at.offset, &message)
            })
        };
        let ca = read(&self.ca, "ca")?;
        let cert = read(&self.cert, "cert")?;
        let key = read(&self.key, "key")?;
        let name = self.sni.as_ref().or(self.host.as_ref());
        // A host may carry a port, a server name may not.
        let name = name.map(|at| {
            at.value
                .rsplit_once(':')
                .map_or(&*at.value, |(name, _)| name)
        });
        let name = name.filter(|name| tls::server_name(name).is_ok());
        Tls::new(name.map(str::to_owned), alpn, &ca, &cert, &key).map_err(|(key, message)| {
            let at = match key {
                "ca" => &self.ca,
                "cert" => &self.cert,
                _ => &self.key,
            };
            let file = at
                .as_ref()
                .map_or(String::new(), |at| at.value.display().to_string());
            let offset = at.as_ref().map_or(section.offset, |at| at.offset);
            refuse(offset, &format!("{key} {file} {message}"))
        })
    }
}

fn value_or<T: Clone>(at: &Option<At<T>>, fallback: T) -> T {
    at.as_ref().map_or(fallback, |at| at.value.clone())
}

/// The value of `key` as `parse` understands it.
fn parsed<T>(
    section: &Section<'_>,
    key: &'static str,
    example: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<At<T>>, Error> {
    let read = |entry: Entry<'_, '_>| {
        let text = entry.text(example)?;
        let value = parse(text).map_err(|message| entry.bad(text, message))?;
        Ok(entry.at(value))
    };
    section.get(key).map(read).transpose()
}

/// A duration that is not zero.
pub(super) fn positive(entry: &Entry<'_, '_>, example: &str) -> Result<At<Duration>, Error> {
    let text = entry.text(example)?;
    let time = value::duration(text).map_err(|message| entry.bad(text, message))?;
    if time.is_zero() {
        let message = format!("is no time at all; choose more, such as \"{example}\"");
        return Err(entry.bad(text, message));
    }
    Ok(entry.at(time))
}

fn kind(text: &str) -> Result<Kind, String> {
    let found = Kind::WORDS.iter().find(|(word, _)| *word == text);
    found.map(|(_, kind)| *kind).ok_or_else(|| {
        let words = Kind::words();
        match closest(text, &words) {
            Some(close) => format!("is unknown; did you mean {close}?"),
            None => format!("is unknown; use one of {}", words.join(", ")),
        }
    })
}

fn start(text: &str) -> Result<Start, String> {
    match text {
        "unknown" => Ok(Start::Unknown),
        "up" => Ok(Start::Up),
        "down" => Ok(Start::Down),
        _ => Err("is unknown; use unknown, up or down".to_owned()),
    }
}

fn method(text: &str) -> Result<(), String> {
    if !text.is_empty() && text.len() <= 20 && text.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Ok(());
    }
    Err("is not an HTTP method; write it like \"GET\" or \"HEAD\"".to_owned())
}

fn path(text: &str) -> Result<(), String> {
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err("is not a path; begin with \"/\" and write spaces and what is not ASCII as %XX".to_owned())
}

fn host(text: &str) -> Result<(), String> {
    if !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/')
    {
        return Ok(());
    }
    Err("is not a host; write it like \"www.example.com\"".to_owned())
}

fn expect(section: &Section<'_>, entry: &Entry<'_, '_>) -> Result<At<Vec<(u16, u16)>>, Error> {
    let (low, high) = STATUS;
    let mut ranges = Vec::new();
    for at in entry.words("200-299", u32::from(low), u32::from(high))? {
        for part in at.value.split(',') {
            let range = value::range(part.trim(), low, high).map_err(|message| {
                section.error(
                    at.offset,
                    format!("expect {} {message}", quote(part.trim())),
                )
            })?;
            ranges.push(range);
        }
    }
    if ranges.is_empty() {
        return Err(entry.error("expect is empty; write it like \"200-299\""));
    }
    Ok(entry.at(ranges))
}

/// `payload` as text, or `payload_hex` as bytes.
fn payload(section: &Section<'_>) -> Result<Option<At<Vec<u8>>>, Error> {
    let bytes = |text: &str| -> Result<Vec<u8>, String> {
        if text.len() > PAYLOAD_MAX {
            return Err(format!("is longer than {PAYLOAD_MAX} bytes; shorten it"));
        }
        Ok(text.as_bytes().to_vec())
    };
    let hex = |text: &str| -> Result<Vec<u8>, String> {
        let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
        let byte = |pair: &[char]| match pair {
            [high, low] => Some(high.to_digit(16)? * 16 + low.to_digit(16)?),
            _ => None,
        };
        digits
            .chunks(2)
            .map(|pair| byte(pair).and_then(|byte| u8::try_from(byte).ok()))
            .collect::<Option<Vec<u8>>>()
            .filter(|bytes| bytes.len() <= PAYLOAD_MAX)
            .ok_or_else(|| {
                "is not a datagram in hexadecimal; write it like \"00 ff 1b\"".to_owned()
            })
    };
    let text = parsed(section, "payload", "ping", bytes)?;
    let hex = parsed(section, "payload_hex", "00 ff 1b", hex)?;
    if let (Some(_), Some(at)) = (&text, &hex) {
        return Err(section.error(
            at.offset,
            "payload_hex and payload exclude each other; remove one",
        ));
    }
    Ok(text.or(hex))
}

fn dns_name(text: &str) -> Result<Name, String> {
    Name::from_ascii(text)
        .map(|mut name| {
            name.set_fqdn(true);
            name
        })
        .map_err(|_| "is not a domain name; write it like \"www.example.com\"".to_owned())
}

fn record(text: &str) -> Result<RecordType, String> {
    RecordType::from_str(text)
        .map_err(|_| "is not a record type; write it like \"A\", \"AAAA\" or \"SOA\"".to_owned())
}

/// Response codes by their names in the registry (RFC 6895, section 2.3).
const RCODES: [(&str, ResponseCode); 11] = [
    ("NOERROR", ResponseCode::NoError),
    ("FORMERR", ResponseCode::FormErr),
    ("SERVFAIL", ResponseCode::ServFail),
    ("NXDOMAIN", ResponseCode::NXDomain),
    ("NOTIMP", ResponseCode::NotImp),
    ("REFUSED", ResponseCode::Refused),
    ("YXDOMAIN", ResponseCode::YXDomain),
    ("YXRRSET", ResponseCode::YXRRSet),
    ("NXRRSET", ResponseCode::NXRRSet),
    ("NOTAUTH", ResponseCode::NotAuth),
    ("NOTZONE", ResponseCode::NotZone),
];

/// The name of a response code, or its number.
#[must_use]
pub fn rcode_name(code: ResponseCode) -> String {
    let found = RCODES.iter().find(|(_, other)| *other == code);
    found.map_or_else(
        || format!("RCODE {}", u16::from(code)),
        |(name, _)| (*name).to_owned(),
    )
}

fn rcodes(section: &Section<'_>, entry: &Entry<'_, '_>) -> Result<At<Vec<ResponseCode>>, Error> {
    let mut codes = Vec::new();
    for at in entry.words("NOERROR", 0, 0)? {
        let found = RCODES.iter().find(|(name, _)| *name == at.value);
        let (_, code) = found.ok_or_else(|| {
            let names = RCODES.map(|(name, _)| name).join(", ");
            let message = format!("rcode {} is unknown; use one of {names}", quote(&at.value));
            section.error(at.offset, message)
        })?;
        codes.push(*code);
    }
    if codes.is_empty() {
        return Err(entry.error("rcode is empty; write it like \"NOERROR\""));
    }
    Ok(entry.at(codes))
}

fn args(entry: &Entry<'_, '_>) -> Result<At<Vec<String>>, Error> {
    let texts = entry.texts("--quick")?;
    if texts.iter().any(|at| at.value.contains('\0')) {
        return Err(entry.error("args hold a zero byte; remove it"));
    }
    Ok(entry.at(texts.into_iter().map(|at| at.value.to_owned()).collect()))
}

/// The user `name` of this system.
pub(super) fn user(name: &str) -> Result<User, String> {
    let unknown =
        || format!("is no user of this system; see \"getent passwd\", or use \"{COMMAND_USER}\"");
    let text = CString::new(name).map_err(|_| unknown())?;
    // SAFETY: plain data, for which all zeroes is a value.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut strings = vec![0; 16 << 10];
    let mut found = std::ptr::null_mut();
    // SAFETY: every pointer is to live memory of the length that is told.
    let result = unsafe {
        libc::getpwnam_r(
            text.as_ptr(),
            &raw mut entry,
            strings.as_mut_ptr(),
            strings.len(),
            &raw mut found,
        )
    };
    if result != 0 || found.is_null() {
        return Err(unknown());
    }
    Ok(User {
        name: name.to_owned(),
        uid: entry.pw_uid,
        gid: entry.pw_gid,
    })
}

/// The check of one service, and those of its backends, which may say otherwise.
pub(super) fn resolve(
    service: &Section<'_>,
    sections: &[Section<'_>],
    protocol: Protocol,
    backends: &mut [Backend],
    (own, defaults): (HealthOptions, &HealthOptions),
) -> Result<Arc<Health>, Error> {
    let options = own.over(defaults);
    let health = Arc::new(options.resolve(service)?);
    let mut sharing = Vec::new();
    for (backend, section) in backends.iter_mut().zip(sections) {
        let own = HealthOptions::read(section)?;
        if own.is_written() {
            let options = own.over(&options);
            backend.health = Arc::new(options.resolve(section)?);
            options.check_port(section, protocol, std::slice::from_ref(backend))?;
        } else {
            backend.health = health.clone();
            sharing.push(backend.clone());
        }
    }
    options.check_port(service, protocol, &sharing)?;
    Ok(health)
}

/// The environment of a command that is run for a backend: whom it is about.
#[must_use]
pub fn environment(service: &super::Service, backend: &Backend) -> Vec<(&'static str, String)> {
    let port = backend.health.port.unwrap_or(backend.address.port());
    vec![
        ("SLUICE_SERVICE", service.name.clone()),
        ("SLUICE_VIP", service.listen.to_string()),
        ("SLUICE_PROTOCOL", service.protocol.name().to_owned()),
        ("SLUICE_BACKEND", backend.name.clone()),
        ("SLUICE_ADDRESS", backend.address.ip().to_string()),
        ("SLUICE_PORT", port.to_string()),
    ]
}
