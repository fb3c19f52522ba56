//! TCP connections: states, connections counted as IPVS counts them, and flows that end.

use lb_common::{flow::state, service::on_backend_down, stats::DropReason};
use sluice_tests::{
    harness::{Balancer, Counts, Expected, TCP, UDP, service},
    packet::{BACKEND_1, BACKEND_2, CLIENT, Family, Packet, VIP, reply, reset_for, tcp, udp},
};

/// A service with one backend, and a connection through it driven step by step.
struct Connection {
    balancer: Balancer,
    family: Family,
    port: u16,
}

/// A backend without connections is not listed.
fn with_load(counts: Counts, active: u64, inactive: u64) -> Counts {
    if (active, inactive) == (0, 0) {
        counts
    } else {
        counts.load(1, active, inactive)
    }
}

fn to_vip(family: Family) -> Packet {
    tcp(family).from(CLIENT, 40000).to(VIP, 80)
}

impl Connection {
    /// After the SYN.
    fn open(family: Family, change: impl FnOnce(&mut sluice_tests::harness::Service)) -> Self {
        let mut s = service(family, TCP, VIP, 80).backend(BACKEND_1, 8080, 1);
        change(&mut s);
        let mut balancer = Balancer::new(vec![s]);
        let syn = to_vip(family).syn();
        let port = balancer.check_new(
            "SYN",
            &syn,
            |port| Expected::sent(&syn.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, syn.ip_len())
                .connection(1, 1)
                .load(1, 0, 1),
        );
        Self {
            balancer,
            family,
            port,
        }
    }

    fn state(&self) -> u8 {
        self.balancer
            .flows(self.family)
            .iter()
            .find(|f| !f.from_backend)
            .expect("the flow exists")
            .state
    }

    /// A segment from the client, forwarded; then state and load are as told.
    #[track_caller]
    fn client(&mut self, what: &str, packet: Packet, state: u8, active: u64, inactive: u64) {
        self.balancer.check(
            what,
            &packet,
            &Expected::sent(&packet.nat_to(BACKEND_1, 8080, self.port)),
            &Counts::default()
                .packet_in(1, 1, packet.ip_len())
                .load(1, active, inactive),
        );
        assert_eq!(self.state(), state, "{what}: the flow's state");
    }

    #[track_caller]
    fn backend(&mut self, what: &str, packet: Packet, state: u8, active: u64, inactive: u64) {
        self.balancer.check(
            what,
            &packet,
            &Expected::sent(&packet.nat_back(VIP, 80, CLIENT, 40000)),
            &with_load(
                Counts::default().packet_out(1, 1, packet.ip_len()),
                active,
                inactive,
            ),
        );
        assert_eq!(self.state(), state, "{what}: the flow's state");
    }

    fn c(&self) -> Packet {
        to_vip(self.family)
    }

    fn b(&self) -> Packet {
        reply(self.family, TCP, BACKEND_1, 8080, self.port)
    }

    fn establish(&mut self) {
        self.backend("SYN-ACK", self.b().syn().ack(), state::SYN_RECEIVED, 0, 1);
        self.client("ACK", self.c().ack(), state::ESTABLISHED, 1, 0);
    }
}

#[test]
fn a_connection_lives_and_is_counted_through_all_states() {
    for family in Family::BOTH {
        let mut c = Connection::open(family, |_| {});
        assert_eq!(c.state(), state::SYN_SENT);
        c.establish();
        c.client(
            "request",
            c.c().ack().psh().payload(*b"GET /"),
            state::ESTABLISHED,
            1,
            0,
        );
        c.backend(
            "answer",
            c.b().ack().payload(*b"200"),
            state::ESTABLISHED,
            1,
            0,
        );
        c.backend("backend's FIN", c.b().ack().fin(), state::FIN_BACKEND, 0, 1);
        c.client(
            "half closed",
            c.c().ack().payload(*b"x"),
            state::FIN_BACKEND,
            0,
            1,
        );
        c.client("client's FIN", c.c().ack().fin(), state::TIME_WAIT, 0, 1);
        c.backend("last ACK", c.b().ack(), state::TIME_WAIT, 0, 1);
    }
}

#[test]
fn the_client_may_close_first() {
    let mut c = Connection::open(Family::V4, |_| {});
    c.establish();
    c.client("client's FIN", c.c().ack().fin(), state::FIN_CLIENT, 0, 1);
    c.client(
        "the same FIN again",
        c.c().ack().fin(),
        state::FIN_CLIENT,
        0,
        1,
    );
    c.backend(
        "data still flows",
        c.b().ack().payload(*b"x"),
        state::FIN_CLIENT,
        0,
        1,
    );
    c.backend("backend's FIN", c.b().ack().fin(), state::TIME_WAIT, 0, 1);
}

#[test]
fn a_reset_closes_from_either_side_and_in_every_state() {
    for family in Family::BOTH {
        let mut c = Connection::open(family, |_| {});
        c.backend(
            "refused by the backend",
            c.b().rst().ack(),
            state::CLOSED,
            0,
            1,
        );

        let mut c = Connection::open(family, |_| {});
        c.establish();
        c.client("reset by the client", c.c().rst(), state::CLOSED, 0, 1);

        let mut c = Connection::open(family, |_| {});
        c.establish();
        c.backend("reset by the backend", c.b().rst(), state::CLOSED, 0, 1);
    }
}

#[test]
fn a_repeated_syn_stays_with_its_flow() {
    let mut c = Connection::open(Family::V4, |_| {});
    c.client("SYN again", c.c().syn(), state::SYN_SENT, 0, 1);
    c.client("and again", c.c().syn(), state::SYN_SENT, 0, 1);
    c.establish();
    c.client("a late SYN", c.c().syn(), state::ESTABLISHED, 1, 0);
    assert_eq!(c.balancer.flows(Family::V4).len(), 2);
}

#[test]
fn a_syn_on_an_ended_flow_begins_a_new_one_elsewhere() {
    for family in Family::BOTH {
        let mut c = Connection::open(family, |s| {
            s.backends.push(sluice_tests::harness::Backend {
                ip: BACKEND_2.ip(family),
                mac: BACKEND_2.mac,
                port: 8080,
                ..s.backends[0].clone()
            });
        });
        c.establish();
        c.client("client's FIN", c.c().ack().fin(), state::FIN_CLIENT, 0, 1);
        c.backend("backend's FIN", c.b().ack().fin(), state::TIME_WAIT, 0, 1);
        let syn = c.c().syn();
        // Round robin: the second flow goes to the second backend.
        let port = c.balancer.check_new(
            "SYN of the next connection",
            &syn,
            |port| Expected::sent(&syn.nat_to(BACKEND_2, 8080, port)),
            &Counts::default()
                .packet_in(1, 2, syn.ip_len())
                .connection(1, 2)
                .load(2, 0, 1),
        );
        assert_eq!(c.state(), state::SYN_SENT);
        let flows = c.balancer.flows(family);
        assert_eq!(flows.len(), 2, "nothing is left of the first: {flows:?}");
        let answer = reply(family, TCP, BACKEND_2, 8080, port).syn().ack();
        c.balancer.check(
            "its SYN-ACK",
            &answer,
            &Expected::sent(&answer.nat_back(VIP, 80, CLIENT, 40000)),
            &Counts::default()
                .packet_out(1, 2, answer.ip_len())
                .load(2, 0, 1),
        );
    }
}

#[test]
fn a_handshake_that_takes_too_long_is_refused() {
    for family in Family::BOTH {
        let mut c = Connection::open(family, |s| s.connect_timeout = 953);
        c.balancer.age_flows(800);
        c.client("still in time", c.c().syn(), state::SYN_SENT, 0, 1);
        c.balancer.age_flows(200);
        let syn = c.c().syn();
        c.balancer.check(
            "too late",
            &syn,
            &Expected::sent(&reset_for(&syn)),
            &Counts::default().drop(DropReason::ConnectTimeout, 1),
        );
        assert!(
            c.balancer.flows(family).is_empty(),
            "the flow is forgotten: the next SYN tries again"
        );
        c.balancer.check_new(
            "the next try",
            &syn,
            |port| Expected::sent(&syn.nat_to(BACKEND_1, 8080, port)),
            &Counts::default()
                .packet_in(1, 1, syn.ip_len())
                .connection(1, 1)
                .load(1, 0, 1),
        );
    }
}

#[test]
fn a_handshake_in_progress_is_not_refused() {
    let mut c = Connection::open(Family::V4, |s| s.connect_timeout = 953);
    c.backend("SYN-ACK", c.b().syn().ack(), state::SYN_RECEIVED, 0, 1);
    c.balancer.age_flows(5000);
    c.client(
        "a SYN that was on its way",
        c.c().syn(),
        state::SYN_RECEIVED,
        0,
        1,
    );
    c.client("ACK", c.c().ack(), state::ESTABLISHED, 1, 0);
    c.balancer.age_flows(5000);
    c.client(
        "data much later",
        c.c().ack().payload(*b"x"),
        state::ESTABLISHED,
        1,
        0,
    );
}

#[test]
fn flows_of_a_dead_backend_are_kept_or_reset_as_told() {
    for family in Family::BOTH {
        // Keep: packets go on as before.
        let mut c = Connection::open(family, |s| s.on_backend_down = on_backend_down::KEEP);
        c.establish();
        c.balancer.change(1, |s| s.backends[0].alive = false);
        c.client("kept", c.c().ack().payload(*b"x"), state::ESTABLISHED, 1, 0);

        // Reset: the client is told.
        let mut c = Connection::open(family, |s| s.on_backend_down = on_backend_down::RESET);
        c.establish();
        c.balancer.change(1, |s| s.backends[0].alive = false);
        let data = c.c().ack().payload(*b"x");
        c.balancer.check(
            "reset",
            &data,
            &Expected::sent(&reset_for(&data)),
            &Counts::default().drop(DropReason::BackendDown, 1),
        );
        assert!(c.balancer.flows(family).is_empty(), "nothing of it is left");
    }
}

#[test]
fn a_syn_on_a_flow_of_a_dead_backend_picks_another() {
    for family in Family::BOTH {
        for down in [on_backend_down::KEEP, on_backend_down::RESET] {
            let mut c = Connection::open(family, |s| {
                s.on_backend_down = down;
                s.backends.push(sluice_tests::harness::Backend {
                    ip: BACKEND_2.ip(family),
                    mac: BACKEND_2.mac,
                    port: 8080,
                    ..s.backends[0].clone()
                });
            });
            c.balancer.change(1, |s| s.backends[0].alive = false);
            let syn = c.c().syn();
            c.balancer.check_new(
                "SYN repeated after the backend's death",
                &syn,
                |port| Expected::sent(&syn.nat_to(BACKEND_2, 8080, port)),
                &Counts::default()
                    .packet_in(1, 2, syn.ip_len())
                    .connection(1, 2)
                    .load(2, 0, 1),
            );
        }
    }
}

#[test]
fn a_backend_number_given_to_another_backend_ends_its_flows() {
    let mut c = Connection::open(Family::V4, |_| {});
    c.establish();
    c.balancer.replace_backend(1, 0);
    let data = c.c().ack();
    c.balancer.check(
        "reset",
        &data,
        &Expected::sent(&reset_for(&data)),
        &Counts::default().drop(DropReason::BackendDown, 1),
    );
    assert!(
        c.balancer.flows(Family::V4).is_empty(),
        "nothing of it is left"
    );
}

/// The former backend may still close its connections; they are not the new one's to lose.
#[test]
fn a_new_backend_does_not_lose_connections_of_the_former() {
    for family in Family::BOTH {
        let mut c = Connection::open(family, |_| {});
        c.establish();
        c.balancer.replace_backend(1, 0);
        c.backend(
            "FIN of the former",
            c.b().ack().fin(),
            state::FIN_BACKEND,
            0,
            0,
        );
        c.backend("RST of the former", c.b().rst(), state::CLOSED, 0, 0);
    }
}

#[test]
fn udp_of_a_dead_backend_picks_again_where_flows_are_reset() {
    for family in Family::BOTH {
        let mut balancer = Balancer::new(vec![
            service(family, UDP, VIP, 53)
                .on_backend_down(on_backend_down::RESET)
                .backend(BACKEND_1, 53, 1)
                .backend(BACKEND_2, 53, 1),
        ]);
        let sent = udp(family).from(CLIENT, 40000).to(VIP, 53);
        balancer.check_new(
            "first",
            &sent,
            |port| Expected::sent(&sent.nat_to(BACKEND_1, 53, port)),
            &Counts::default()
                .packet_in(1, 1, sent.ip_len())
                .connection(1, 1)
                .load(1, 1, 0),
        );
        balancer.change(1, |s| s.backends[0].alive = false);
        balancer.check_new(
            "after its death",
            &sent,
            |port| Expected::sent(&sent.nat_to(BACKEND_2, 53, port)),
            &Counts::default()
                .packet_in(1, 2, sent.ip_len())
                .connection(1, 2)
                .load(2, 1, 0),
        );
    }
}
