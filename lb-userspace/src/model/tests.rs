use super::*;
use crate::config::{AttachMode, Config};
use proptest::prelude::*;
use std::time::Duration;

/// Two services; the second shares the first one's addresses and is not checked.
const TEXT: &str = r#"
[daemon]
interfaces = ["eth0"]

[[service]]
name = "web"
listen = "198.51.100.10:80"
[service.health]
type = "tcp"
rise = 2
fall = 3
flap_limit = 0
[[service.backend]]
name = "a"
address = "10.0.0.11:80"
weight = 6
[[service.backend]]
name = "b"
address = "10.0.0.12:80"
weight = 4

[[service]]
name = "plain"
listen = "198.51.100.10:81"
[[service.backend]]
address = "10.0.0.11:81"
"#;

fn config(text: &str) -> Config {
    let config = Config::parse(text, std::path::Path::new("lb.toml")).unwrap();
    assert_eq!(config.daemon.mode, AttachMode::Auto);
    config
}

fn key(port: u16, backend: &str) -> BackendKey {
    BackendKey {
        service: ServiceKey {
            listen: SocketAddr::from(([198, 51, 100, 10], port)).into(),
            protocol: Protocol::Tcp,
        },
        address: backend.parse().unwrap(),
    }
}

fn a() -> BackendKey {
    key(80, "10.0.0.11:80")
}

fn plain() -> BackendKey {
    key(81, "10.0.0.11:81")
}

fn result(good: bool) -> CheckResult {
    let code = if good { Code::L4Ok } else { Code::L4Connection };
    let text = if good { "" } else { "Connection refused" };
    CheckResult::new(code, text, Duration::from_millis(1))
}

/// The model of [`TEXT`], the ways to its backends known.
fn model(now: Instant) -> Model {
    let mut model = Model::new();
    model.configure(&config(TEXT).services, now);
    for address in model.addresses() {
        model.set_path(address, Path::Open, |_| None, now);
    }
    model
}

fn stands(model: &Model, key: BackendKey) -> (State, u32, bool, String) {
    let backend = model.backend(key).unwrap();
    (
        backend.state(),
        backend.effective_weight().hundredths() / 100,
        backend.may_keep_flows(),
        backend.reason(),
    )
}

#[test]
fn the_first_result_decides_and_later_ones_count() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut model = model(now);
    assert_eq!(
        stands(&model, a()),
        (State::Starting, 0, true, "not checked yet".into())
    );

    let change = model.check_result(a(), result(true), at(1)).unwrap();
    assert_eq!(
        (change.backend, change.from, change.to),
        (a(), State::Starting, State::Up)
    );
    assert_eq!(stands(&model, a()), (State::Up, 6, true, "L4OK".into()));
    assert_eq!(model.backend(a()).unwrap().since(), at(1));

    assert_eq!(model.check_result(a(), result(false), at(2)), None);
    assert_eq!(model.check_result(a(), result(false), at(3)), None);
    assert_eq!(model.check_result(a(), result(true), at(4)), None);
    assert_eq!(model.check_result(a(), result(false), at(5)), None);
    assert_eq!(model.check_result(a(), result(false), at(6)), None);
    assert_eq!(model.backend(a()).unwrap().since(), at(1));
    assert!(model.check_result(a(), result(false), at(7)).is_some());
    let reason = "L4CON Connection refused".to_owned();
    assert_eq!(stands(&model, a()), (State::Down, 0, false, reason));
    assert_eq!(model.backend(a()).unwrap().since(), at(7));

    assert_eq!(model.check_result(a(), result(true), at(8)), None);
    assert!(model.check_result(a(), result(true), at(9)).is_some());
    assert_eq!(stands(&model, a()).0, State::Up);
}

#[test]
fn one_failure_is_enough_at_first() {
    let now = Instant::now();
    let mut model = model(now);
    assert!(model.check_result(a(), result(false), now).is_some());
    assert_eq!(stands(&model, a()).0, State::Down);
}

#[test]
fn without_a_check_the_way_alone_decides() {
    let now = Instant::now();
    let mut model = Model::new();
    model.configure(&config(TEXT).services, now);
    let pending = "next hop not known yet".to_owned();
    assert_eq!(stands(&model, plain()), (State::Starting, 0, true, pending));

    let ip = plain().address.ip();
    let changes = model.set_path(ip, Path::Open, |_| None, now);
    // The checked backend at the same address is still starting, so only one changed.
    assert_eq!(changes.len(), 1);
    assert_eq!(
        stands(&model, plain()),
        (State::Up, 1, true, "no check".into())
    );
    // A result that arrives although nobody asked is of a check that was removed.
    assert_eq!(model.check_result(plain(), result(false), now), None);

    model.check_result(a(), result(true), now);
    let blocked = Path::Blocked("no neighbour 10.0.0.11 on eth0".into());
    assert_eq!(model.set_path(ip, blocked, |_| None, now).len(), 2);
    let reason = "no neighbour 10.0.0.11 on eth0".to_owned();
    assert_eq!(
        stands(&model, plain()),
        (State::Down, 0, false, reason.clone())
    );
    assert_eq!(stands(&model, a()), (State::Down, 0, false, reason));
    assert_eq!(model.set_path(ip, Path::Open, |_| None, now).len(), 2);
    assert_eq!(stands(&model, a()).0, State::Up);
    assert_eq!(
        model.set_path("203.0.113.9".parse().unwrap(), Path::Open, |_| None, now),
        []
    );
}

#[test]
fn drain_keeps_flows_and_maintenance_does_not() {
    let now = Instant::now();
    let mut model = model(now);
    model.check_result(a(), result(true), now);

    assert!(model.set_admin(a(), Admin::Drain, now).is_some());
    assert_eq!(stands(&model, a()), (State::Up, 0, true, "L4OK".into()));
    assert_eq!(model.set_admin(a(), Admin::Drain, now), None);
    assert!(model.backend(a()).unwrap().is_checked());

    assert!(model.set_admin(a(), Admin::Maint, now).is_some());
    assert_eq!(
        stands(&model, a()),
        (State::Unknown, 0, false, "in maintenance".into())
    );
    assert!(!model.backend(a()).unwrap().is_checked());
    assert_eq!(model.check_result(a(), result(true), now), None);

    assert!(model.set_admin(a(), Admin::Ready, now).is_some());
    assert_eq!(stands(&model, a()).0, State::Starting);
    model.check_result(a(), result(true), now);
    assert_eq!(stands(&model, a()), (State::Up, 6, true, "L4OK".into()));
}

#[test]
fn a_reload_keeps_what_is_known() {
    let now = Instant::now();
    let mut model = model(now);
    model.check_result(a(), result(true), now);
    model.set_admin(a(), Admin::Drain, now);
    let later = now + Duration::from_secs(5);

    // Renamed, reordered, another weight, another check; and a backend at a known address.
    let text = TEXT
        .replace("\"a\"", "\"first\"")
        .replace("\"web\"", "\"site\"")
        .replace("weight = 6", "weight = 7")
        .replace("type = \"tcp\"", "type = \"http\"")
        + "[[service.backend]]\naddress = \"10.0.0.12:99\"\n";
    let mut services = config(&text).services;
    services.reverse();
    model.configure(&services, later);
    let backend = model.backend(a()).unwrap();
    assert_eq!(backend.config().name, "first");
    assert_eq!((backend.state(), backend.since()), (State::Up, now));
    assert_eq!(backend.admin(), Admin::Drain);
    assert_eq!(backend.last_check(), None);
    assert_eq!(stands(&model, key(81, "10.0.0.12:99")).0, State::Up);
    model.set_admin(a(), Admin::Ready, later);
    assert_eq!(stands(&model, a()).1, 7);

    // What is gone is forgotten, and begins anew when it comes back.
    let gone = TEXT.replace("10.0.0.11", "10.0.0.13");
    model.configure(&config(&gone).services, later);
    assert!(model.backend(a()).is_none());
    assert_eq!(model.check_result(a(), result(true), later), None);
    model.configure(&config(TEXT).services, later);
    assert_eq!(stands(&model, a()).0, State::Starting);
    assert_eq!(stands(&model, plain()).0, State::Starting);
}

#[test]
fn a_check_that_is_added_does_not_empty_the_pool() {
    let now = Instant::now();
    let mut model = model(now);
    let text = TEXT.to_owned() + "[service.health]\ntype = \"tcp\"\n";
    model.configure(&config(&text).services, now);
    assert_eq!(
        stands(&model, plain()),
        (State::Up, 1, true, "not checked yet".into())
    );
    for expected in [State::Up, State::Up, State::Down] {
        model.check_result(plain(), result(false), now);
        assert_eq!(stands(&model, plain()).0, expected);
    }
}

#[test]
fn a_restart_begins_with_what_was_known() {
    let now = Instant::now();
    let mut model = Model::new();
    model.configure(&config(TEXT).services, now);
    let alive = Inherited {
        alive: true,
        resolved: true,
    };
    let dead = Inherited {
        alive: false,
        resolved: true,
    };
    let b = key(80, "10.0.0.12:80");
    assert!(model.inherit(a(), alive, now).is_some());
    assert!(model.inherit(b, dead, now).is_some());
    let reason = "not checked since the daemon started".to_owned();
    assert_eq!(stands(&model, a()), (State::Up, 6, true, reason));
    assert_eq!(stands(&model, b).0, State::Down);
    model.check_result(a(), result(false), now);
    assert_eq!(stands(&model, a()).0, State::Up);
    model.check_result(b, result(true), now);
    assert_eq!(stands(&model, b).0, State::Down);
}

#[test]
fn only_backends_that_take_flows_have_a_weight() {
    let now = Instant::now();
    let mut model = model(now);
    model.check_result(a(), result(true), now);
    let service = &model.services()[0];
    assert_eq!(service.backends_up(), 1);
    let weights: Vec<u32> = service
        .backends
        .iter()
        .map(|backend| backend.effective_weight().hundredths())
        .collect();
    assert_eq!(weights, [600, 0]);
}

/// What rise and fall mean, said another way: the last run of equal results that was long enough
/// decides, and the very first result if there was none.
fn by_runs(results: &[bool], rise: u32, fall: u32) -> State {
    let mut verdict = results.first().copied();
    let mut run = 0;
    for (position, &good) in results.iter().enumerate() {
        let continues = position > 0 && results[position - 1] == good;
        run = if continues { run + 1 } else { 1 };
        if run >= if good { rise } else { fall } {
            verdict = Some(good);
        }
    }
    match verdict {
        None => State::Starting,
        Some(true) => State::Up,
        Some(false) => State::Down,
    }
}

#[derive(Clone, Debug)]
enum Event {
    Check(bool),
    Admin(Admin),
    Path(Path),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any::<bool>().prop_map(Event::Check),
        1 => prop_oneof![Just(Admin::Ready), Just(Admin::Drain), Just(Admin::Maint)]
            .prop_map(Event::Admin),
        1 => prop_oneof![Just(Path::Open), Just(Path::Blocked("no route".into()))]
            .prop_map(Event::Path),
    ]
}

proptest! {
    #[test]
    fn rise_and_fall_count_runs(
        results in prop::collection::vec(any::<bool>(), 0..60),
        rise in 1_u32..5,
        fall in 1_u32..5,
    ) {
        let text = TEXT.replace("rise = 2", &format!("rise = {rise}"))
            .replace("fall = 3", &format!("fall = {fall}"));
        let now = Instant::now();
        let mut model = Model::new();
        model.configure(&config(&text).services, now);
        model.set_path(a().address.ip(), Path::Open, |_| None, now);
        for (done, &good) in results.iter().enumerate() {
            prop_assert_eq!(stands(&model, a()).0, by_runs(&results[..done], rise, fall));
            model.check_result(a(), result(good), now);
        }
        prop_assert_eq!(stands(&model, a()).0, by_runs(&results, rise, fall));
    }

    #[test]
    fn whatever_happens_only_a_good_backend_has_weight(
        events in prop::collection::vec(event(), 0..80),
    ) {
        let start = Instant::now();
        let mut model = model(start);
        let (mut admin, mut path, mut asked) = (Admin::Ready, Path::Open, Vec::new());
        for (second, event) in (1..).zip(events) {
            let now = start + Duration::from_secs(second);
            let (before, was) = (stands(&model, a()), admin);
            let change = match event {
                Event::Check(good) => {
                    if admin != Admin::Maint {
                        asked.push(good);
                    }
                    model.check_result(a(), result(good), now)
                }
                Event::Admin(new) => {
                    if admin == Admin::Maint && new != Admin::Maint {
                        asked.clear();
                    }
                    admin = new;
                    model.set_admin(a(), new, now)
                }
                Event::Path(new) => {
                    path = new.clone();
                    let changes = model.set_path(a().address.ip(), new, |_| None, now);
                    changes.into_iter().find(|change| change.backend == a())
                }
            };
            let after = stands(&model, a());
            let checked = by_runs(&asked, 2, 3);
            let expected = match (admin, &path) {
                (Admin::Maint, _) => State::Unknown,
                (_, Path::Blocked(_)) => State::Down,
                _ => checked,
            };
            prop_assert_eq!(after.0, expected);
            let takes = admin == Admin::Ready && expected == State::Up;
            prop_assert_eq!(after.1, if takes { 6 } else { 0 });
            prop_assert!(after.2 || after.1 == 0, "new flows, but none may stay");
            // A change is told exactly if something is seen from outside.
            let seen = (before.0, before.1, before.2) != (after.0, after.1, after.2);
            prop_assert_eq!(change.is_some(), seen || was != admin);
            let since = model.backend(a()).unwrap().since();
            prop_assert_eq!(since == now, before.0 != after.0);
            prop_assert!(!after.3.is_empty());
        }
    }
}

/// A key on the first VIP.
fn on(ports: Ports) -> ServiceKey {
    ServiceKey {
        listen: Listen {
            ip: IpAddr::from([198, 51, 100, 10]),
            ports,
        },
        protocol: Protocol::Tcp,
    }
}

#[test]
fn a_range_continues_the_one_it_shares_most_ports_with() {
    let (low, high) = (on(Ports::Range(10, 19)), on(Ports::Range(20, 29)));
    for (after, expected) in [
        (vec![on(Ports::Range(10, 20))], vec![(0, low)]),
        (vec![on(Ports::Range(19, 29))], vec![(0, high)]),
        (vec![on(Ports::One(25))], vec![(0, high)]),
        (vec![on(Ports::Range(30, 39))], vec![]),
        (vec![on(Ports::Any)], vec![]),
        // One that stays is nobody else's past.
        (vec![low, on(Ports::Range(20, 20))], vec![(1, high)]),
        // Each continues at most one, and each is continued once.
        (
            vec![on(Ports::Range(10, 12)), on(Ports::Range(13, 29))],
            vec![(0, low), (1, high)],
        ),
    ] {
        let expected: HashMap<ServiceKey, ServiceKey> = expected
            .into_iter()
            .map(|(new, old): (usize, ServiceKey)| (after[new], old))
            .collect();
        assert_eq!(successions(&[low, high], &after), expected, "{after:?}");
    }
    let udp = ServiceKey {
        protocol: Protocol::Udp,
        ..low
    };
    assert!(successions(&[low], &[udp]).is_empty());
    assert!(successions(&[on(Ports::Any)], &[low]).is_empty());
}

#[test]
fn backends_of_a_range_that_is_resized_keep_their_state() {
    let now = Instant::now();
    let range = |ports: &str| config(&TEXT.replace("10:80\"", &format!("10:{ports}\"")));
    let mut model = Model::new();
    model.configure(&range("70-80").services, now);
    let key = |ports| BackendKey {
        service: on(ports),
        address: a().address,
    };
    let before = key(Ports::Range(70, 80));
    model.set_path(before.address.ip(), Path::Open, |_| None, now);
    model.check_result(before, result(true), now);
    assert_eq!(model.backend(before).unwrap().state(), State::Up);
    model.configure(&range("80-80").services, now);
    assert_eq!(model.backend(a()).unwrap().state(), State::Up);
    model.configure(&range("90-99").services, now);
    let new = key(Ports::Range(90, 99));
    assert_eq!(model.backend(new).unwrap().state(), State::Starting);
}

#[test]
fn a_backup_takes_new_flows_only_while_no_other_backend_does() {
    let now = Instant::now();
    let text = TEXT.replace("weight = 4", "weight = 4\nbackup = true");
    let mut model = Model::new();
    model.configure(&config(&text).services, now);
    for address in model.addresses() {
        model.set_path(address, Path::Open, |_| None, now);
    }
    let b = key(80, "10.0.0.12:80");
    let weights = |model: &Model| {
        let weights = model.services()[0].weights();
        weights
            .map(|weight| weight.hundredths() / 100)
            .collect::<Vec<_>>()
    };
    model.check_result(b, result(true), now);
    assert_eq!(weights(&model), [0, 4], "nothing is known of the other yet");
    model.check_result(a(), result(true), now);
    assert_eq!(weights(&model), [6, 0]);
    for _ in 0..3 {
        model.check_result(a(), result(false), now);
    }
    assert_eq!(weights(&model), [0, 4]);
    for _ in 0..2 {
        model.check_result(a(), result(true), now);
    }
    assert_eq!(weights(&model), [6, 0]);
    model.set_admin(a(), Admin::Drain, now);
    assert_eq!(weights(&model), [0, 4], "a drained one takes no new flows");
}

/// The model of a service with these keys and these of its check, its backends' ways known, and
/// what of it the daemon begins with up.
fn begun(keys: &str, health: &str, now: Instant) -> Model {
    let text = TEXT
        .replacen("[service.health]", &format!("{keys}\n[service.health]"), 1)
        .replacen("flap_limit = 0", health, 1);
    let mut model = Model::new();
    model.configure(&config(&text).services, now);
    for address in model.addresses() {
        model.set_path(address, Path::Open, |_| None, now);
    }
    model.check_result(a(), result(true), now);
    model
}

fn hundredths(model: &Model, key: BackendKey) -> u32 {
    model.backend(key).unwrap().effective_weight().hundredths()
}

#[test]
fn a_backend_that_comes_back_starts_slowly_and_none_at_the_daemons_start() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut model = begun("slow_start = \"20s\"", "", now);
    assert_eq!(hundredths(&model, a()), 600, "the daemon begins with it");

    for _ in 0..3 {
        model.check_result(a(), result(false), at(1));
    }
    for _ in 0..2 {
        model.check_result(a(), result(true), at(100));
    }
    // Twentieths of 6, the first at once.
    assert_eq!(hundredths(&model, a()), 30);
    let mut seen = vec![];
    for second in 100..130 {
        model.tick(at(second));
        seen.push(hundredths(&model, a()));
    }
    let expected = (1..=20).chain([20; 10]).map(|twentieths| 30 * twentieths);
    assert_eq!(seen, expected.collect::<Vec<_>>());
    assert_eq!(model.tick(at(200)), []);

    // Drained in the middle and made ready again, it begins anew.
    model.set_admin(a(), Admin::Drain, at(200));
    assert_eq!(hundredths(&model, a()), 0);
    model.set_admin(a(), Admin::Ready, at(201));
    assert_eq!(hundredths(&model, a()), 30);
    assert_eq!(model.tick(at(206)).len(), 1, "the maps have to follow");
    assert_eq!(hundredths(&model, a()), 180);
    // What was not there when the daemon began is cold as well.
    let text = TEXT.replace(
        "weight = 4\n",
        "weight = 4\n[[service.backend]]\naddress = \"10.0.0.14\"\n",
    );
    let text = text.replacen(
        "[service.health]",
        "slow_start = \"20s\"\n[service.health]",
        1,
    );
    model.configure(&config(&text).services, at(300));
    let added = key(80, "10.0.0.14:80");
    model.set_path(added.address.ip(), Path::Open, |_| None, at(300));
    model.check_result(added, result(true), at(300));
    assert_eq!(hundredths(&model, added), 5);
}

#[test]
fn flows_of_a_drained_backend_end_when_their_time_is_over() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut model = begun("drain_timeout = \"10s\"", "", now);
    let keeps = |model: &Model| model.backend(a()).unwrap().may_keep_flows();
    model.set_admin(a(), Admin::Drain, at(5));
    assert_eq!(model.tick(at(14)), []);
    assert!(keeps(&model));
    assert_eq!(model.tick(at(15)).len(), 1);
    assert!(!keeps(&model));
    assert_eq!(model.tick(at(16)), []);
    model.set_admin(a(), Admin::Ready, at(17));
    assert!(keeps(&model));
}

#[test]
fn a_backend_that_flaps_has_to_prove_itself() {
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut model = begun("", "flap_limit = 2\nflap_window = \"60s\"", now);
    let up = |model: &Model| stands(model, a()).0 == State::Up;
    let mut round = |second: u64| {
        model.tick(at(second));
        for _ in 0..3 {
            model.check_result(a(), result(false), at(second));
        }
        assert!(!up(&model));
        let mut needed = 0;
        while !up(&model) {
            model.check_result(a(), result(true), at(second));
            needed += 1;
        }
        needed
    };
    assert_eq!([round(1), round(2), round(3), round(4)], [2, 4, 8, 16]);
    for second in 5..9 {
        round(second);
    }
    assert_eq!(round(9), 64, "that much, and no more");
    assert_eq!(round(59), 64);
    // A quiet minute later only the last fall counts, and the new one.
    assert_eq!(round(100), 4);
}

#[test]
fn too_few_healthy_backends_are_helped_by_the_others() {
    let now = Instant::now();
    let b = key(80, "10.0.0.12:80");
    for (threshold, panics) in [(0, false), (50, false), (51, true), (100, true)] {
        let mut model = begun(&format!("panic_threshold = {threshold}"), "", now);
        model.check_result(b, result(false), now);
        let which = HashSet::from([b.service]);
        let changes = |begins| vec![("web".to_owned(), begins)];
        let begun = if panics { changes(true) } else { vec![] };
        assert_eq!(model.judge_panics(&which, now), begun, "{threshold}");
        assert_eq!(stands(&model, b).0, State::Down);
        assert_eq!(hundredths(&model, b), if panics { 400 } else { 0 });
        assert_eq!(model.backend(b).unwrap().may_keep_flows(), panics);
        // One that is drained on purpose is not missed.
        model.set_admin(b, Admin::Drain, now);
        let ended = if panics { changes(false) } else { vec![] };
        assert_eq!(model.judge_panics(&which, now), ended);
        assert_eq!(hundredths(&model, b), 0);
        assert_eq!(hundredths(&model, a()), 600);
    }
}

#[test]
fn the_agent_sets_weight_admin_and_state() {
    let now = Instant::now();
    let mut model = begun("", "agent_port = 9000", now);
    let mut say = |line: &str| {
        let heard = CheckResult {
            report: line.parse().ok(),
            ..CheckResult::new(Code::L7Ok, line, Duration::ZERO)
        };
        model.agent_result(a(), &heard, now);
        let backend = model.backend(a()).unwrap();
        let weight = backend.effective_weight().hundredths();
        (backend.admin(), backend.state(), weight)
    };
    let (ready, up) = (Admin::Ready, State::Up);
    assert_eq!(say("75%"), (ready, up, 450));
    assert_eq!(say("no idea"), (ready, up, 450), "nothing is heard");
    assert_eq!(say("drain"), (Admin::Drain, up, 0));
    assert_eq!(say("50%"), (Admin::Drain, up, 0));
    assert_eq!(say("ready"), (ready, up, 300));
    assert_eq!(say("down # disk full"), (ready, State::Down, 0));
    assert_eq!(say("up"), (ready, up, 600));
    assert_eq!(say("maint"), (Admin::Maint, State::Unknown, 0));
    // What was found before the maintenance counts for nothing after it.
    assert_eq!(say("up"), (ready, State::Starting, 0));
    model.check_result(a(), result(true), now);
    assert_eq!(hundredths(&model, a()), 600);
    // The operator's word goes first.
    model.set_admin(a(), Admin::Drain, now);
    assert_eq!(model.backend(a()).unwrap().admin(), Admin::Drain);
}
