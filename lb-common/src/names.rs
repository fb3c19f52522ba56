//! The words operators read and write for the numbers in the maps.

use crate::{flow::state, service};

/// A table of numbers and their words.
pub type Names = &'static [(u8, &'static str)];

/// Words for [`service::forward`].
pub const FORWARD: Names = &[
    (service::forward::NAT, "nat"),
    (service::forward::DNAT, "dnat"),
    (service::forward::DSR, "dsr"),
    (service::forward::IPIP, "ipip"),
    (service::forward::GUE, "gue"),
];

/// Words for [`service::scheduler`].
pub const SCHEDULER: Names = &[
    (service::scheduler::MAGLEV, "maglev"),
    (service::scheduler::ROUND_ROBIN, "round-robin"),
    (service::scheduler::SOURCE_HASH, "source-hash"),
    (service::scheduler::LEAST_CONNECTIONS, "least-connections"),
    (service::scheduler::RANDOM, "random"),
];

/// Words for [`service::on_no_backend`].
pub const ON_NO_BACKEND: Names = &[
    (service::on_no_backend::RESET, "reset"),
    (service::on_no_backend::DROP, "drop"),
    (service::on_no_backend::PASS, "pass"),
];

/// Words for [`service::on_backend_down`].
pub const ON_BACKEND_DOWN: Names = &[
    (service::on_backend_down::KEEP, "keep"),
    (service::on_backend_down::RESET, "reset"),
    (service::on_backend_down::RESCHEDULE, "reschedule"),
];

/// Words for [`state`], as `ipvsadm -lc` and `ss` write them.
pub const STATE: Names = &[
    (state::UDP, "UDP"),
    (state::SYN_SENT, "SYN_SENT"),
    (state::SYN_RECEIVED, "SYN_RECV"),
    (state::ESTABLISHED, "ESTABLISHED"),
    (state::FIN_CLIENT, "FIN_CLIENT"),
    (state::FIN_BACKEND, "FIN_BACKEND"),
    (state::TIME_WAIT, "TIME_WAIT"),
    (state::CLOSED, "CLOSED"),
];

/// The word for `number`, or `"unknown"`.
#[must_use]
pub fn name_of(names: Names, number: u8) -> &'static str {
    names
        .iter()
        .find(|(n, _)| *n == number)
        .map_or("unknown", |(_, name)| name)
}

/// The number for `name`.
#[must_use]
pub fn number_of(names: Names, name: &str) -> Option<u8> {
    names.iter().find(|(_, n)| *n == name).map(|(n, _)| *n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_leads_back_to_its_number() {
        for names in [FORWARD, SCHEDULER, ON_NO_BACKEND, ON_BACKEND_DOWN, STATE] {
            for (number, name) in names {
                assert_eq!(number_of(names, name), Some(*number));
                assert_eq!(name_of(names, *number), *name);
            }
        }
        assert_eq!(name_of(STATE, 200), "unknown");
        assert_eq!(number_of(STATE, "nonsense"), None);
    }
}
