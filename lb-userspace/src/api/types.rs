//! What the API says, as flat JSON objects. Field names are stable.

use serde::{Deserialize, Serialize};

/// Counters that services and backends share. Bytes are those of IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Established connections (and UDP flows).
    pub active_connections: u64,
    /// Connections being opened or closed.
    pub inactive_connections: u64,
    /// Connections since the counters began.
    pub connections_total: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Packets dropped or refused.
    pub drops: u64,
}

/// `GET /v1/services`: one service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Name.
    pub name: String,
    /// VIP and ports: `VIP:80`, `VIP:8000-8100`, `VIP:*`.
    pub listen: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Forward mode.
    pub forward: String,
    /// Scheduler.
    pub scheduler: String,
    /// Backends that take new flows.
    pub backends_up: u32,
    /// Backends configured.
    pub backends_total: u32,
    /// Seconds an established flow may be silent.
    pub idle_timeout_seconds: f64,
    /// Seconds a handshake may take, if limited.
    pub connect_timeout_seconds: Option<f64>,
    /// Router that answers go to whose flow is not recorded, if there are any.
    pub gateway: Option<String>,
    /// How backends are checked: `none`, `tcp`, `tls`, `http`, `https`, `udp`, `dns`, `grpc` or `exec`.
    pub health: String,
    /// Counters.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// `GET /v1/backends[?service=NAME]`: one backend of one service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// Service it belongs to.
    pub service: String,
    /// Name.
    pub name: String,
    /// `address:port`; without a port if packets keep the port they were sent to.
    pub address: String,
    /// Configured weight.
    pub weight: u32,
    /// Weight in force: 0 unless the backend takes new flows; a fraction where a slow start or its
    /// agent makes less than 1 of a small one.
    #[serde(serialize_with = "number")]
    pub effective_weight: f64,
    /// `ready`, `drain` or `maint`.
    pub admin: String,
    /// `up`, `down`, `starting`, `stopping` or `unknown`.
    pub state: String,
    /// The last check's result, such as `L7OK 200` or `L4TOUT`, or why no traffic can be sent.
    pub reason: String,
    /// Seconds since `state` last changed.
    pub state_seconds: f64,
    /// When `state` last changed, as Unix time.
    pub last_change: u64,
    /// The last check's result, such as `L7OK`, if there was one.
    pub check_code: Option<String>,
    /// What more that check found, if there was one.
    pub check_text: Option<String>,
    /// Seconds the last check took, if there was one.
    pub check_duration: Option<f64>,
    /// The last line of the agent that is asked beside the check, or why there is none.
    pub agent: Option<String>,
    /// Counters.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// A whole number as an integer.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes every field so"
)]
fn number<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(value) {
        serializer.serialize_u32(*value as u32)
    } else {
        serializer.serialize_f64(*value)
    }
}

/// `GET /v1/services/{name}/backends/{backend}/flows`: flows that have not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFlows {
    /// Flows that neither side has ended.
    pub open: u64,
    /// Whether others may belong to the backend that nobody has recorded yet.
    pub others: bool,
}

/// `GET /v1/drops`: packets dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops {
    /// Name of the reason.
    pub reason: String,
    /// Packets.
    pub packets: u64,
}

/// `GET /v1/connections`: one flow, as `ipvsadm -lnc` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Seconds until it expires.
    pub expires_seconds: f64,
    /// State, such as `ESTABLISHED`.
    pub state: String,
    /// Client's `address:port`.
    pub source: String,
    /// VIP's `address:port`.
    pub virtual_address: String,
    /// Backend's `address:port`.
    pub destination: String,
    /// The source `address:port` that the backend sees: in `nat` the balancer's, else the client's.
    pub nat_source: String,
    /// Service name.
    pub service: String,
    /// Backend name.
    pub backend: String,
}

/// `GET /v1/connections/count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Flows that match.
    pub connections: u64,
}

/// The query of `GET /v1/connections` and `GET /v1/connections/count`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionQuery {
    /// Name or `VIP:port/protocol` of a service.
    pub service: Option<String>,
    /// Name or `address:port` of a backend.
    pub backend: Option<String>,
    /// Client's address, prefix or `address:port`.
    pub client: Option<String>,
    /// State, such as `ESTABLISHED`; upper or lower case.
    pub state: Option<String>,
    /// How many at most; all if left out.
    pub limit: Option<usize>,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Process number.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime: f64,
    /// The configuration file in force.
    pub config: String,
    /// Directory of the pinned maps, programs and links.
    pub pin_path: String,
    /// Why the last reload was refused, if it was; the configuration before it is in force.
    pub reload_error: Option<String>,
    /// Whether the data plane of an earlier daemon was taken over.
    pub adopted: bool,
    /// Attached interfaces.
    pub interfaces: Vec<InterfaceStatus>,
    /// Programs in the kernel.
    pub programs: Vec<ProgramStatus>,
    /// Maps in the kernel.
    pub maps: Vec<MapStatus>,
    /// Established connections and UDP flows that had to make room for others in the flow table, since the data plane
    /// was loaded.
    pub flows_displaced: u64,
    /// Flows that began while more did than `limits.new_flows_per_cpu` allows to be recorded.
    pub flows_limited: u64,
    /// Services configured.
    pub services: u32,
    /// Backends in state `up`.
    pub backends_up: u32,
    /// Backends configured.
    pub backends_total: u32,
}

/// One attached interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Name.
    pub name: String,
    /// `driver` or `generic`.
    pub mode: String,
}

/// One program in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Name.
    pub name: String,
    /// The kernel's number for it.
    pub id: u32,
    /// Instructions the verifier walked, 0 where the kernel does not tell.
    pub verified_instructions: u32,
}

/// One map in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapStatus {
    /// Name.
    pub name: String,
    /// Entries in use.
    pub entries: u64,
    /// Entries it has room for.
    pub max_entries: u64,
}

/// The body of every answer whose HTTP status is 4xx or 5xx.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// One line that names the object and what to do.
    pub error: String,
}
