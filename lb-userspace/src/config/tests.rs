mod modes;

use super::*;
use lb_common::service::{forward, on_backend_down, on_no_backend, scheduler};
use proptest::prelude::*;

const MINIMAL: &str = include_str!("../../../examples/minimal.toml");
const FULL: &str = include_str!("../../../examples/full.toml");

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("lb.toml")).map_err(|error| error.to_string())
}

/// A service in front of which `head` may add other sections; `service` starts in line 6.
fn with_service(service: &str) -> String {
    format!(
        "[daemon]\ninterfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nlisten = \"198.51.100.10:80\"\n{service}"
    )
}

/// The error of a service whose further lines, from line 6 on, are `service`.
fn service_error(service: &str) -> String {
    parse(&with_service(service)).expect_err(service)
}

#[test]
fn the_minimal_example_has_the_documented_defaults() {
    let backend = |address: &str| Backend {
        name: address.to_owned(),
        address: address.parse().unwrap(),
        weight: 1,
        backup: false,
        max_connections: 0,
        health: Arc::default(),
    };
    let expected = Config {
        daemon: Daemon {
            interfaces: vec!["eth0".to_owned()],
            mode: AttachMode::Auto,
            pin_path: "/sys/fs/bpf/sluice".into(),
            socket: "/run/sluice/control.sock".into(),
            http: None,
            answer_arp: true,
            nat_ports: None,
            nat_sources: Vec::new(),
            encap_source: EncapSource::default(),
            gue_port: 6080,
            on_state_change: vec![],
            local_clients: None,
            cgroup: None,
            probe_mark: 0x51c0_0000,
        },
        limits: Limits {
            flows: 1_048_576,
            services: 4096,
            listeners: 65536,
            backends: 16384,
            slots: 4_194_304,
            fragments: 8192,
            clients: 65536,
            prefixes: 65536,
            opening: 131_072,
            new_flows_per_cpu: 125_000,
        },
        timeouts: Timeouts::default(),
        services: vec![Service {
            name: "web".to_owned(),
            listen: "198.51.100.10:80".parse().unwrap(),
            protocol: Protocol::Tcp,
            forward: forward::NAT,
            scheduler: scheduler::MAGLEV,
            table_size: 0,
            track_all: false,
            gateway: None,
            on_no_backend: on_no_backend::RESET,
            on_backend_down: on_backend_down::KEEP,
            idle_timeout: Duration::from_secs(900),
            connect_timeout: None,
            slow_start: Duration::ZERO,
            drain_timeout: None,
            panic_threshold: 0,
            affinity: Duration::ZERO,
            affinity_mask: 32,
            max_new_per_source: 0,
            allow: vec![],
            deny: vec![],
            health: Arc::default(),
            backends: vec![backend("10.0.0.11:3001"), backend("10.0.0.12:3002")],
        }],
    };
    assert_eq!(parse(MINIMAL), Ok(expected));
}

#[test]
fn the_full_example_says_what_it_says() {
    let config = parse(FULL).unwrap();
    assert_eq!(config.daemon.interfaces, ["eth0", "eth1"]);
    assert_eq!(config.daemon.http, Some("127.0.0.1:9099".parse().unwrap()));
    assert_eq!(config.daemon.nat_ports, Some((1024, 32767)));
    let [web, web6, dns, media, lab, syslog, rpc, mail, tunnelled] = &config.services[..] else {
        panic!("nine services");
    };
    assert_eq!(tunnelled.forward, forward::GUE);
    assert!(tunnelled.backends[1].address.ip().is_ipv6());
    assert_eq!(web.scheduler, scheduler::ROUND_ROBIN);
    assert_eq!(web.on_backend_down, on_backend_down::RESET);
    assert_eq!(web.connect_timeout, Some(Duration::from_secs(3)));
    let request = Http {
        method: "GET".to_owned(),
        path: "/health".to_owned(),
        host: Some("www.example.com".to_owned()),
        expect: vec![(200, 299), (301, 301)],
        body: Some("^ok".parse().unwrap()),
    };
    assert_eq!(
        *web.health,
        Health {
            check: Check::Http(Box::new(request), None),
            port: Some(8080),
            interval: Duration::from_secs(2),
            fast_interval: Duration::from_millis(500),
            down_interval: Duration::from_secs(5),
            jitter: 10,
            timeout: Duration::from_millis(500),
            rise: 2,
            fall: 3,
            start: Start::Unknown,
            flap_limit: 4,
            flap_window: Duration::from_secs(600),
            eject_after: 5,
            eject_time: Duration::from_secs(10),
            agent: web.health.agent.clone(),
        }
    );
    let agent = web.health.agent.as_ref().unwrap();
    assert_eq!((&agent.check, agent.port), (&Check::Agent, Some(9777)));
    assert_eq!(web.slow_start, Duration::from_secs(30));
    assert_eq!(web.drain_timeout, Some(Duration::from_secs(300)));
    assert_eq!(web.panic_threshold, 0);
    assert_eq!(
        config.daemon.on_state_change,
        ["/usr/local/bin/tell", "--mail"]
    );
    assert_eq!(web.backends[0].health, web.health);
    assert_eq!(web.backends[2].health.port, Some(9090));
    assert_eq!(web.backends[2].health.check, web.health.check);
    assert_eq!(web.backends[0].name, "app1");
    assert_eq!((web.backends[0].weight, web.backends[1].weight), (6, 4));
    assert_eq!(web6.listener(), "[2001:db8::1]:443/tcp");
    assert_eq!(web6.connect_timeout, Some(Duration::from_secs(1)));
    assert_eq!(web6.backends[1].name, "[2001:db8:1::12]:443");
    assert_eq!(dns.connect_timeout, None);
    assert_eq!(dns.idle_timeout, Duration::from_secs(10));
    assert_eq!(dns.backends[0].address.to_string(), "10.0.0.53:53");
    assert_eq!(media.listen.ports, Ports::Range(30000, 30999));
    assert_eq!(media.listener(), "198.51.100.10:30000-30999/udp");
    assert_eq!(media.backends[0].address, "10.0.0.61:0".parse().unwrap());
    assert_eq!(media.backends[0].name, "10.0.0.61");
    assert_eq!(media.health.check, Check::Tcp);
    assert_eq!(media.health.port, Some(5060));
    assert_eq!(lab.listener(), "198.51.100.20:*/tcp");
    assert!(matches!(&web6.health.check, Check::Http(_, Some(tls))
        if tls.name.as_deref() == Some("www.example.com")));
    assert!(matches!(&dns.health.check, Check::Dns(dns) if dns.record.to_string() == "A"));
    assert!(matches!(&syslog.health.check, Check::Udp(udp)
        if udp.payload == b"<14>check" && !udp.must_answer));
    assert!(matches!(&rpc.health.check, Check::Grpc(grpc) if grpc.service == "my.package.Service"));
    assert!(matches!(&mail.health.check, Check::Exec(exec)
        if exec.args == ["--quick"] && exec.user.name == "nobody" && exec.user.uid != 0));
}

#[test]
fn equal_files_make_equal_configurations() {
    assert_eq!(parse(FULL), parse(FULL));
    let other = FULL.replace("weight = 6", "weight = 5");
    assert_ne!(parse(FULL), parse(&other));
}

/// Services `a`, in line 5, and `b`, in line 9, that listen on the two.
fn two_listeners(a: &str, b: &str) -> Result<Config, String> {
    parse(&format!(
        "[daemon]\ninterfaces = [\"eth0\"]\n[[service]]\nname = \"a\"\nlisten = \"{a}\"\n\
         [[service]]\nname = \"b\"\nlisten = \"{b}\"\n",
    ))
}

#[test]
fn listeners_that_overlap_are_refused_with_both_lines() {
    let vip = "198.51.100.10";
    for (a, b) in [
        ("80", "80"),
        ("8000-8100", "8050"),
        ("8050", "8000-8100"),
        ("8000-8100", "8100-8200"),
        ("8000-8100", "7000-8000"),
        ("8000-8100", "8000-8100"),
        ("1-65535", "443"),
        ("*", "*"),
    ] {
        let error = two_listeners(&format!("{vip}:{a}"), &format!("{vip}:{b}")).unwrap_err();
        let expected = if a == b {
            format!(
                "lb.toml:8: service \"b\": {vip}:{b}/tcp is already taken in line 5; choose another \
                 address, port or protocol"
            )
        } else {
            format!(
                "lb.toml:8: service \"b\": {vip}:{b}/tcp overlaps {vip}:{a}/tcp in line 5; choose \
                 other ports, another address or protocol"
            )
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn listeners_side_by_side_are_accepted() {
    for (a, b) in [
        ("198.51.100.10:8000-8100", "198.51.100.10:8101-8200"),
        ("198.51.100.10:8000-8100", "198.51.100.10:7999"),
        ("198.51.100.10:8000-8100", "198.51.100.11:8000-8100"),
        // The other one is for the rest.
        ("198.51.100.10:*", "198.51.100.10:8000-8100"),
        ("198.51.100.10:1-65535", "198.51.100.10:*"),
        ("[2001:db8::1]:*", "[2001:db8::1]:443"),
        ("[2001:db8::1]:1-2", "[2001:db8::2]:1-2"),
        ("[2001:db8::1]:*", "198.51.100.10:*"),
        (
            "198.51.100.10:80\"\nprotocol = \"udp",
            "198.51.100.10:80-81",
        ),
    ] {
        let result = two_listeners(a, b);
        assert!(result.is_ok(), "{a} and {b}: {result:?}");
    }
}

#[test]
fn mistakes_in_listen_say_what_to_write() {
    for (listen, complaint) in [
        (
            "198.51.100.10:8100-8000",
            "has a range that begins above its end; write \"198.51.100.10:8000-8100\"",
        ),
        (
            "198.51.100.10:0-80",
            "has port 0, which no packet carries; choose 1 to 65535",
        ),
        ("198.51.100.10", "has no port; write it like"),
        ("198.51.100.10:1-70000", "has no valid port; write it like"),
        ("*:80", "is not an address and port; write it like"),
        (
            "127.0.0.1:*",
            "is a loopback address; use a unicast address",
        ),
    ] {
        let error = parse(&MINIMAL.replace("198.51.100.10:80", listen)).unwrap_err();
        let expected = format!("lb.toml:7: service \"web\": listen \"{listen}\" {complaint}");
        assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
    }
}

#[test]
fn a_check_of_a_backend_without_a_port_needs_one() {
    let range = |lines: &str| {
        let service = with_service(lines).replace(":80\"", ":8000-8100\"");
        parse(&service)
    };
    let backends = "[[service.backend]]\naddress = \"10.0.0.11\"";
    let health = |lines: &str| range(&format!("[service.health]\n{lines}\n{backends}"));
    assert_eq!(
        health("type = \"tcp\"").unwrap_err(),
        "lb.toml:7: service \"web\": health: a tcp check needs a port to ask at, and backend \
         \"10.0.0.11\" has none of its own; add port, or write type = \"none\""
    );
    assert!(health("type = \"tcp\"\nport = 80").is_ok());
    assert!(health("type = \"none\"").is_ok());
    assert!(range(backends).is_ok());
    let own =
        "[service.health]\ntype = \"http\"\n[[service.backend]]\naddress = \"10.0.0.11:3001\"";
    assert!(range(own).is_ok(), "the backend has a port of its own");
    let one = format!("[service.health]\ntype = \"tcp\"\n{backends}");
    let one = parse(&with_service(&one)).unwrap();
    assert_eq!(one.services[0].backends[0].address.port(), 80);
}

#[test]
fn a_mode_that_keeps_ports_takes_backends_at_the_services_own() {
    let service = |ports: &str, backend: &str| {
        let lines =
            format!("forward = \"dsr\"\n[[service.backend]]\naddress = \"10.0.0.11{backend}\"");
        parse(&with_service(&lines).replace(":80\"", &format!(":{ports}\"")))
    };
    for (ports, backend) in [("80", ":8080"), ("8000-8100", ":8000"), ("*", ":8000")] {
        assert_eq!(
            service(ports, backend).unwrap_err(),
            format!(
                "lb.toml:8: service \"web\": backend \"10.0.0.11{backend}\": its port {} is not the \
                 VIP's {ports}, and forward \"dsr\" leaves ports as they are; leave the port out, or \
                 use forward \"nat\"",
                &backend[1..]
            )
        );
    }
    for (ports, backend) in [("81", ":81"), ("81", ""), ("8000-8100", ""), ("*", "")] {
        let result = service(ports, backend);
        assert!(result.is_ok(), "{result:?}");
    }
}

#[test]
fn values_that_change_nothing_are_accepted() {
    let plain = parse(&with_service("backend = [{ address = \"10.0.0.1\" }]")).unwrap();
    let neutral = with_service(
        "affinity = \"0s\"\nslow_start = \"0s\"\nallow = [\"0.0.0.0/0\", \"::/0\"]\ndeny = []\n\
         forward = \"nat\"\non_backend_down = \"keep\"\nhealth = { type = \"none\" }\n\
         backend = [{ address = \"10.0.0.1\", weight = 1, backup = false, max_connections = 0 }]",
    );
    assert_eq!(parse(&neutral), Ok(plain));
}

#[test]
fn mistakes_in_a_service_name_line_object_and_remedy() {
    for (lines, complaint) in [
        (
            "wieght = 1",
            "6: service \"web\": unknown key \"wieght\"; known here:",
        ),
        (
            "schedular = 1",
            "6: service \"web\": unknown key \"schedular\"; did you mean \"scheduler\"?",
        ),
        (
            "scheduler = \"roundrobin\"",
            "6: service \"web\": scheduler \"roundrobin\" is unknown; did you mean \"round-robin\"?",
        ),
        (
            "scheduler = 5",
            "6: service \"web\": scheduler is an integer, but must be a string such as \"maglev\"",
        ),
        (
            "protocol = \"sctp\"",
            "6: service \"web\": protocol \"sctp\" is unknown; use tcp or udp",
        ),
        (
            "idle_timeout = \"15\"",
            "6: service \"web\": idle_timeout \"15\" has no unit; write \"15s\"",
        ),
        (
            "idle_timeout = \"0s\"",
            "6: service \"web\": idle_timeout \"0s\" is no time at all; choose more",
        ),
        (
            "idle_timeout = \"90d\"",
            "6: service \"web\": idle_timeout \"90d\" is too long; choose at most \"14d\"",
        ),
        (
            "protocol = \"udp\"\nconnect_timeout = \"1s\"",
            "7: service \"web\": connect_timeout is for tcp",
        ),
        (
            "backend = 5",
            "6: service \"web\": backend is an integer, but must be an array of tables; write each as [[service.backend]]",
        ),
        (
            "[[service.backend]]",
            "6: service \"web\": backend 1: address is missing; write address = \"10.0.0.11:3001\"",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.256:80\"",
            "7: service \"web\": backend 1: address \"10.0.0.256:80\" is not an address; write it like",
        ),
        (
            "[[service.backend]]\nname = \"a\"\naddress = \"::1\"",
            "8: service \"web\": backend \"a\": address \"::1\" cannot be a backend",
        ),
        (
            "forward = \"dsr\"\n[[service.backend]]\naddress = \"127.0.0.1\"",
            "8: service \"web\": backend 127.0.0.1:80 is a loopback address, which takes only forward nat or dnat",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.1\"\nweight = 65536",
            "8: service \"web\": backend 10.0.0.1:80: weight 65536 is out of range; choose 0 to 65535",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.1\"\nweight = -1",
            "8: service \"web\": backend 10.0.0.1:80: weight -1 is out of range; choose 0 to 65535",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.1\"\nwieght = 1",
            "8: service \"web\": backend 10.0.0.1:80: unknown key \"wieght\"; did you mean \"weight\"?",
        ),
        (
            "[[service.backend]]\naddress = \"2001:db8::1\"",
            "7: service \"web\": backend \"[2001:db8::1]:80\": its address 2001:db8::1 is IPv6 but the VIP is IPv4",
        ),
        (
            "[[service.backend]]\naddress = \"198.51.100.10\"",
            "7: service \"web\": backend \"198.51.100.10:80\": its address 198.51.100.10 is the VIP of service \"web\"",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.1\"\n[[service.backend]]\naddress = \"10.0.0.1:80\"",
            "9: service \"web\": backend \"10.0.0.1:80\": address 10.0.0.1:80 is already a backend in line 7; remove one",
        ),
        (
            "[[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1\"\n[[service.backend]]\nname = \"a\"\naddress = \"10.0.0.2\"",
            "11: service \"web\": backend \"a\": the name is already taken by the backend in line 8",
        ),
        (
            "[[service]]\nname = \"web\"\nlisten = \"198.51.100.11:80\"",
            "7: service \"web\": the name is already taken in line 4; choose another",
        ),
        (
            "[[service]]\nname = \"b\"\nlisten = \"198.51.100.10:80\"",
            "8: service \"b\": 198.51.100.10:80/tcp is already taken in line 5; choose another",
        ),
        (
            "[[service]]\nlisten = \"198.51.100.11:80\"",
            "6: service 2: name is missing; give it one",
        ),
        (
            "[[service]]\nname = \"b c\"",
            "7: service 2: name \"b c\" is not a name; begin with",
        ),
        (
            "[[service]]\nname = \"b\"",
            "6: service \"b\": listen is missing; write listen =",
        ),
        (
            "[service.health]\ntype = \"agent\"\nport = 1\nagent_port = 2",
            "9: service \"web\": health: agent_port is for an agent beside another check; remove it",
        ),
        (
            "panic_threshold = 101",
            "6: service \"web\": panic_threshold 101 is out of range; choose 0 to 100",
        ),
        (
            "drain_timeout = \"0s\"",
            "6: service \"web\": drain_timeout \"0s\" is no time at all; choose more",
        ),
        (
            "[service.health]\ntype = \"tcp\"\nfast_interval = \"2s\"",
            "8: service \"web\": health: fast_interval 2s is longer than interval 1s; choose at most 1s",
        ),
        (
            "[service.health]\ntype = \"http\"\nexpect_body = \"(\"",
            "8: service \"web\": health: expect_body \"(\" is not a regular expression: unclosed group",
        ),
        (
            "[service.health]\ntype = \"https\"\nverify = true",
            "8: service \"web\": health: verify needs the authorities to trust; write ca = ",
        ),
        (
            "[service.health]\ntype = \"https\"\nca = \"/proc/version\"",
            "8: service \"web\": health: verify needs the name in the certificate; add sni",
        ),
        (
            "[service.health]\ntype = \"https\"\nhost = \"a.b\"\nca = \"/proc/version\"",
            "9: service \"web\": health: ca /proc/version holds no certificate; it must be in PEM format",
        ),
        (
            "[service.health]\ntype = \"https\"\nsni = \"a b\"",
            "8: service \"web\": health: sni \"a b\" is not the name of a server",
        ),
        (
            "[service.health]\ntype = \"tls\"\ncert = \"/nowhere/a.crt\"",
            "8: service \"web\": health: cert needs its key; add key",
        ),
        (
            "[service.health]\ntype = \"tls\"\ncert = \"/nowhere/a\"\nkey = \"/nowhere/b\"",
            "8: service \"web\": health: cert /nowhere/a cannot be read: No such file",
        ),
        (
            "[service.health]\ntype = \"http\"\nca = \"/a\"",
            "8: service \"web\": health: ca is not for an http check; remove it",
        ),
        (
            "[service.health]\ntype = \"dns\"",
            "7: service \"web\": health: a dns check needs a name; write name = ",
        ),
        (
            "[service.health]\ntype = \"dns\"\nname = \"a\"\nrecord = \"B\"",
            "9: service \"web\": health: record \"B\" is not a record type",
        ),
        (
            "[service.health]\ntype = \"dns\"\nname = \"a\"\nrcode = \"OK\"",
            "9: service \"web\": health: rcode \"OK\" is unknown; use one of NOERROR, ",
        ),
        (
            "[service.health]\ntype = \"udp\"\npayload = \"a\"\npayload_hex = \"61\"",
            "9: service \"web\": health: payload_hex and payload exclude each other",
        ),
        (
            "[service.health]\ntype = \"udp\"\npayload_hex = \"6\"",
            "8: service \"web\": health: payload_hex \"6\" is not a datagram in hexadecimal",
        ),
        (
            "[service.health]\ntype = \"exec\"",
            "7: service \"web\": health: an exec check needs a command; write command = ",
        ),
        (
            "[service.health]\ntype = \"exec\"\ncommand = \"check\"",
            "8: service \"web\": health: command \"check\" is not an absolute path",
        ),
        (
            "[service.health]\ntype = \"exec\"\ncommand = \"/a\"\nuser = \"no body\"",
            "9: service \"web\": health: user \"no body\" is no user of this system",
        ),
        (
            "[service.health]\ntype = \"tcp\"\nstart = \"sideways\"",
            "8: service \"web\": health: start \"sideways\" is unknown; use unknown, up or down",
        ),
        (
            "[[service.backend]]\naddress = \"10.0.0.1\"\n[service.backend.health]\nport = 9",
            "9: service \"web\": backend 10.0.0.1:80: health: port without a type has no effect",
        ),
        (
            "[service.health]\ntype = \"tcp\"\n[[service.backend]]\naddress = \"10.0.0.1\"\n\
             health = { path = \"/\" }",
            "10: service \"web\": backend 10.0.0.1:80: health: path is not for a tcp check; remove it",
        ),
        (
            "[service.health]\ntype = \"http\"\npath = \"health\"",
            "8: service \"web\": health: path \"health\" is not a path; begin with \"/\"",
        ),
        (
            "[service.health]\npath = \"/\"",
            "7: service \"web\": health: path without a type has no effect; add type",
        ),
        (
            "[service.health]\ntype = \"tcp\"\npath = \"/\"",
            "8: service \"web\": health: path is not for a tcp check; remove it",
        ),
        (
            "[service.health]\ntype = \"tcp\"\ntimeout = \"2s\"",
            "8: service \"web\": health: timeout 2s is longer than interval 1s; choose an interval of at least 2s",
        ),
        (
            "[service.health]\ntype = \"tcp\"\nrise = 0",
            "8: service \"web\": health: rise 0 is out of range; choose 1 to 65535",
        ),
        (
            "[service.health]\ntype = \"http\"\nexpect = \"2xx\"",
            "8: service \"web\": health: expect \"2xx\" is not a range of numbers from 100 to 599",
        ),
        (
            "[service.health]\ntype = \"http\"\nexpect = [200, 1.5]",
            "8: service \"web\": health: expect is a number with a fraction, but must be",
        ),
        (
            "[service.health]\ntype = \"http\"\nport = 0",
            "8: service \"web\": health: port 0 is out of range; choose 1 to 65535",
        ),
        (
            "protocol = \"udp\"\n[service.health]\ntype = \"tcp\"",
            "8: service \"web\": health: a tcp check of a udp service needs a TCP port to ask at; add port",
        ),
    ] {
        let error = service_error(lines);
        let expected = format!("lb.toml:{complaint}");
        assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
    }
}

#[test]
fn mistakes_outside_services_name_line_object_and_remedy() {
    let daemon = |lines: &str| format!("[daemon]\ninterfaces = [\"eth0\"]\n{lines}");
    for (text, complaint) in [
        (
            String::new(),
            "1: section [daemon] is missing; write [daemon] and interfaces",
        ),
        (
            "[daemon]\n".into(),
            "1: daemon: interfaces is missing; write interfaces = [\"eth0\"]",
        ),
        (
            "[daemon]\ninterfaces = []".into(),
            "2: daemon: interfaces is empty; name at least one",
        ),
        (
            "[daemon]\ninterfaces = \"eth0\"".into(),
            "2: daemon: interfaces is a string, but must be a list of strings",
        ),
        (
            "[daemon]\ninterfaces = [\n\"eth0\",\n\"eth0\"]".into(),
            "4: daemon: interface \"eth0\" is named twice",
        ),
        (
            "[daemon]\ninterfaces = [\"a-name-of-16-byte\"]".into(),
            "2: daemon: interface \"a-name-of-16-byte\" is longer than 15 bytes",
        ),
        (
            "[daemon]\ninterfaces = [\"a/b\"]".into(),
            "2: daemon: interface \"a/b\" is not a name",
        ),
        (
            daemon("mode = \"native\""),
            "3: daemon: mode \"native\" is unknown; use auto, driver or generic",
        ),
        (
            daemon("pin_path = \"sluice\""),
            "3: daemon: pin_path \"sluice\" is not an absolute path",
        ),
        (
            daemon("pin_path = \"/sys/fs/bpf/a.b\""),
            "3: daemon: pin_path \"/sys/fs/bpf/a.b\" cannot be made on a BPF file system",
        ),
        (
            daemon("socket = \"/run/\""),
            "3: daemon: socket \"/run/\" is a directory; name a file in it",
        ),
        (
            daemon("http = \"localhost:1\""),
            "3: daemon: http \"localhost:1\" is not an address and port",
        ),
        (
            daemon("http = \"127.0.0.1:0\""),
            "3: daemon: http \"127.0.0.1:0\" has port 0",
        ),
        (
            daemon("answer_arp = \"yes\""),
            "3: daemon: answer_arp is a string, but must be true or false",
        ),
        (
            daemon("nat_ports = \"9-1\""),
            "3: daemon: nat_ports \"9-1\" begins above its end; write \"1-9\"",
        ),
        (
            daemon("nat_ports = \"0-70000\""),
            "3: daemon: nat_ports \"0-70000\" is not a range of numbers from 1 to 65535",
        ),
        (
            daemon("nat_sources = [\"10.0.0.2\", \"10.0.0.2\"]"),
            "3: daemon: nat_sources \"10.0.0.2\" is named twice; name addresses that the balancer holds, see \"ip address\"",
        ),
        (
            daemon("nat_sources = [\"10.0.0.2/24\"]"),
            "3: daemon: nat_sources \"10.0.0.2/24\" is not an IP address; name addresses that the balancer holds, see \"ip address\"",
        ),
        (
            daemon("nat_sources = [\"224.0.0.1\"]"),
            "3: daemon: nat_sources \"224.0.0.1\" is not the address of one host; name addresses that the balancer holds, see \"ip address\"",
        ),
        (
            daemon("[limits]\nflows = 0"),
            "4: limits: flows 0 is out of range; choose 1 to",
        ),
        (
            daemon("[limits]\nflow = 1"),
            "4: limits: unknown key \"flow\"; did you mean \"flows\"?",
        ),
        (
            daemon("[[services]]"),
            "3: unknown key \"services\"; did you mean \"service\"?",
        ),
        (
            daemon("[service]"),
            "3: service is a table, but must be an array of tables; write each as [[service]]",
        ),
        (
            daemon("[defaults]\nname = \"x\""),
            "4: defaults: unknown key \"name\"",
        ),
        (
            daemon("[defaults]\nidle_timeout = \"1\""),
            "4: defaults: idle_timeout \"1\" has no unit",
        ),
        (
            daemon("[defaults]\naffinity = \"1\""),
            "4: defaults: affinity \"1\" has no unit",
        ),
        (
            daemon("[defaults.health]\ntype = \"htpp\""),
            "4: defaults: health: type \"htpp\" is unknown; did you mean \"http\"?",
        ),
        (
            daemon("x = 10m"),
            "3: not valid TOML at \"10m\": put the value in quotation marks",
        ),
        (daemon("x = ["), "3: not valid TOML"),
        (
            daemon("mode = \"auto\"\nmode = \"auto\""),
            "4: not valid TOML at \"mode\": duplicate key",
        ),
    ] {
        let error = parse(&text).expect_err(&text);
        let expected = format!("lb.toml:{complaint}");
        assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
    }
}

#[test]
fn limits_must_have_room_for_what_is_configured() {
    let small = |line: &str| parse(&format!("{MINIMAL}\n[limits]\n{line}"));
    let range = MINIMAL.replace(":80\"", ":8000-8100\"");
    let range = |line: &str| parse(&format!("{range}\n[limits]\n{line}"));
    assert_eq!(
        range("listeners = 100").unwrap_err(),
        "lb.toml:13: limits: listeners = 100 is too small for 101 ports on IPv4 VIPs; write \
         listeners = 101 or more"
    );
    assert!(range("listeners = 101").is_ok());
    assert_eq!(
        small("services = 100000").unwrap().limits.listeners,
        100_000
    );
    assert_eq!(
        small("backends = 1").unwrap_err(),
        "lb.toml:13: limits: backends = 1 is too small for 2 backends; write backends = 2 or more"
    );
    assert!(small("backends = 2\nservices = 1").is_ok());
    assert_eq!(
        small("slots = 300").unwrap_err(),
        "lb.toml:13: limits: slots = 300 is too small for the selection tables of all services \
         and their replacements; write slots = 502 or more"
    );
    assert!(small("slots = 502").is_ok());
}

#[test]
fn weights_that_no_table_can_hold_are_refused() {
    let mut service = String::from("scheduler = \"round-robin\"\n");
    for number in 1..=40 {
        let weight = 65_536 - number;
        service +=
            &format!("[[service.backend]]\naddress = \"10.0.0.{number}\"\nweight = {weight}\n");
    }
    assert_eq!(
        service_error(&service),
        "lb.toml:4: service \"web\": the weights make a round-robin sequence of 2620620 slots, \
         more than 1048576; use smaller weights, or weights with a common divisor"
    );
}

#[test]
fn defaults_cascade_key_by_key() {
    let text = |service: &str| {
        format!(
            "[daemon]\ninterfaces = [\"eth0\"]\n[defaults]\nscheduler = \"source-hash\"\n\
             connect_timeout = \"2s\"\n[defaults.health]\ntype = \"http\"\npath = \"/up\"\n\
             interval = \"5s\"\n[[service]]\nname = \"web\"\nlisten = \"198.51.100.10:80\"\n{service}"
        )
    };
    let service = |lines: &str| parse(&text(lines)).map(|mut config| config.services.remove(0));

    let inherited = service("").unwrap();
    assert_eq!(inherited.scheduler, scheduler::SOURCE_HASH);
    assert_eq!(inherited.connect_timeout, Some(Duration::from_secs(2)));
    assert_eq!(inherited.health.interval, Duration::from_secs(5));
    assert!(matches!(&inherited.health.check, Check::Http(http, None) if http.path == "/up"));

    let own = service("scheduler = \"maglev\"\n[service.health]\npath = \"/own\"").unwrap();
    assert_eq!(own.scheduler, scheduler::MAGLEV);
    assert_eq!(own.health.interval, Duration::from_secs(5));
    assert!(matches!(&own.health.check, Check::Http(http, None) if http.path == "/own"));

    let tcp = service("[service.health]\ntype = \"tcp\"\nport = 9").unwrap();
    assert_eq!((&tcp.health.check, tcp.health.port), (&Check::Tcp, Some(9)));
    assert_eq!(tcp.health.interval, Duration::from_secs(5));

    let udp = service("protocol = \"udp\"\n[service.health]\ntype = \"none\"").unwrap();
    assert_eq!(udp.connect_timeout, None);
    assert_eq!(udp.idle_timeout, Duration::from_secs(60));
}

#[test]
fn a_short_interval_shortens_the_default_timeout() {
    let config = parse(&with_service(
        "[service.health]\ntype = \"tcp\"\ninterval = \"200ms\"",
    ));
    let health = &config.unwrap().services[0].health;
    assert_eq!(health.timeout, Duration::from_millis(200));
}

#[test]
fn a_service_may_have_no_backend() {
    assert_eq!(parse(&with_service("")).unwrap().services[0].backends, []);
}

#[test]
fn services_and_backends_are_found_as_operators_address_them() {
    let config = parse(FULL).unwrap();
    let name = |text: &str| {
        config
            .find_service(text)
            .map(|service| service.name.clone())
    };
    assert_eq!(name("web").as_deref(), Ok("web"));
    assert_eq!(name("198.51.100.10:80/tcp").as_deref(), Ok("web"));
    assert_eq!(name("[2001:db8:0::1]:443/tcp").as_deref(), Ok("web6"));
    assert_eq!(name("198.51.100.10:53/udp").as_deref(), Ok("dns"));
    assert_eq!(
        name("198.51.100.10:30000-30999/udp").as_deref(),
        Ok("media")
    );
    assert_eq!(name("198.51.100.20:*/tcp").as_deref(), Ok("lab"));
    let error = |text: &str| name(text).unwrap_err().to_string();
    assert_eq!(
        error("wbe"),
        "service \"wbe\": there is none; did you mean \"web\"?"
    );
    assert!(error("198.51.100.10:80").contains("write 198.51.100.10:80/tcp or"));
    assert!(error("198.51.100.10:80/sctp").contains("/tcp or /udp"));
    assert!(error("198.51.100.10:80/udp").contains("there is none"));

    let web = config.find_service("web").unwrap();
    assert_eq!(web.find_backend("app2").unwrap().weight, 4);
    assert_eq!(web.find_backend("10.0.0.12:3002").unwrap().name, "app2");
    let media = config.find_service("media").unwrap();
    assert_eq!(media.find_backend("10.0.0.62").unwrap().name, "10.0.0.62");
    assert!(media.find_backend("10.0.0.62:30000").is_err());
    assert!(error("198.51.100.10:30000-30999").contains("the protocol is missing"));
    assert_eq!(
        web.find_backend("zzz").unwrap_err().to_string(),
        "service \"web\": backend \"zzz\": there is none; see \"sluice backend list web\""
    );
}

#[test]
fn files_that_cannot_be_used_get_one_line() {
    let directory = std::env::temp_dir().join(format!("sluice-config-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let load = |path: &Path| Config::load(path).map_err(|error| error.to_string());
    let missing = directory.join("missing.toml");
    let latin1 = directory.join("latin1.toml");
    std::fs::write(&latin1, b"[daemon]\n# caf\xe9\n").unwrap();
    let good = directory.join("good.toml");
    std::fs::write(&good, MINIMAL).unwrap();
    let results = [load(&missing), load(&directory), load(&latin1), load(&good)];
    std::fs::remove_dir_all(&directory).unwrap();

    let [missing, folder, latin1, good] = results;
    let missing = missing.unwrap_err();
    assert!(
        missing.contains("missing.toml: cannot be read: No such file"),
        "{missing}"
    );
    assert!(
        folder
            .unwrap_err()
            .contains("cannot be read: Is a directory")
    );
    let latin1 = latin1.unwrap_err();
    assert!(latin1.ends_with("latin1.toml:2: this line is not UTF-8 text; save the file as UTF-8"));
    assert_eq!(good, parse(MINIMAL));
}

#[test]
fn ten_thousand_backends_are_read_at_once() {
    let mut text = with_service("");
    for number in 0..10_000 {
        text += &format!(
            "[[service.backend]]\naddress = \"10.1.{}.{}\"\n",
            number / 256,
            number % 256
        );
    }
    assert_eq!(parse(&text).unwrap().services[0].backends.len(), 10_000);
}

fn assert_one_line(text: &str) -> Result<(), TestCaseError> {
    if let Err(error) = Config::parse(text, Path::new("lb.toml")) {
        let shown = error.to_string();
        prop_assert!(!shown.contains(['\n', '\r']), "{shown:?}");
        let line = error.line().expect("an error in a text has a line");
        let lines = text.lines().count().max(1);
        prop_assert!(
            (1..=lines).contains(&line),
            "line {line} of {lines}: {shown}"
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_panics(text in "(?s).{0,200}") {
        assert_one_line(&text)?;
    }

    #[test]
    fn no_mutation_of_a_good_file_panics(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), 0_usize..6, "[\\[\\]=\".,0-9a-z\\-\n\\\\é\u{1}\u{2028} ]{0,6}"),
            1..4,
        ),
    ) {
        let mut text: Vec<char> = FULL.chars().collect();
        for (place, deleted, inserted) in edits {
            let start = place.index(text.len() + 1);
            let end = (start + deleted).min(text.len());
            text.splice(start..end, inserted.chars());
        }
        assert_one_line(&text.into_iter().collect::<String>())?;
    }

    #[test]
    fn no_exchanged_value_panics(
        place in any::<prop::sample::Index>(),
        value in prop_oneof![
            Just("5".to_owned()),
            Just("-1".to_owned()),
            Just("99999999999999999999".to_owned()),
            Just("1.5".to_owned()),
            Just("true".to_owned()),
            Just("[]".to_owned()),
            Just("[1, \"a\", {}]".to_owned()),
            Just("{ a = 1 }".to_owned()),
            Just("1979-05-27".to_owned()),
            "[^\"\\\\\n\r]{0,30}".prop_map(|text| format!("{text:?}")),
        ],
    ) {
        let keys: Vec<usize> = (0..FULL.lines().count())
            .filter(|&line| FULL.lines().nth(line).is_some_and(|line| line.contains(" = ") && !line.starts_with('#')))
            .collect();
        let chosen = keys[place.index(keys.len())];
        let text: Vec<String> = FULL
            .lines()
            .enumerate()
            .map(|(number, line)| match line.split_once(" = ") {
                Some((key, _)) if number == chosen => format!("{key} = {value}"),
                _ => line.to_owned(),
            })
            .collect();
        assert_one_line(&text.join("\n"))?;
    }
}

#[test]
fn lists_of_clients_decide_by_the_longest_prefix() {
    let rules = |lines: &str| -> Vec<String> {
        let config = parse(&with_service(lines)).unwrap();
        let rules = config.services[0].rules();
        rules
            .map(|(prefix, allow)| format!("{prefix} {allow}"))
            .collect()
    };
    assert_eq!(rules(""), Vec::<String>::new());
    assert_eq!(rules("deny = [\"192.0.2.7\"]"), ["192.0.2.7/32 false"]);
    assert_eq!(
        rules("allow = [\"10.0.0.0/8\", \"2001:db8::/32\"]\ndeny = [\"10.9.0.0/16\"]"),
        ["10.0.0.0/8 true", "10.9.0.0/16 false", "0.0.0.0/0 false"],
        "with an allow list nobody else may come"
    );
    assert_eq!(
        rules("allow = [\"10.9.0.0/16\", \"0.0.0.0/0\"]\ndeny = [\"10.0.0.0/8\"]"),
        ["10.9.0.0/16 true", "0.0.0.0/0 true", "10.0.0.0/8 false"]
    );
    assert_eq!(
        rules("allow = [\"10.9.0.0/16\"]\ndeny = [\"0.0.0.0/0\"]"),
        ["10.9.0.0/16 true", "0.0.0.0/0 false"]
    );
}

#[test]
fn mistakes_about_clients_are_refused() {
    for (lines, complaint) in [
        (
            "allow = [\"2001:db8::/32\"]",
            "allow names no IPv4 clients, so none could come; add some, or \"0.0.0.0/0\"",
        ),
        (
            "deny = [\"10.0.0.1/8\"]",
            "deny \"10.0.0.1/8\" has bits set behind its prefix; set them to zero",
        ),
        (
            "deny = [\"10.0.0.1\", \"10.0.0.1/32\"]",
            "deny \"10.0.0.1/32\" is listed twice; remove one",
        ),
        (
            "allow = [\"10.0.0.0/8\"]\ndeny = [\"10.0.0.0/8\"]",
            "deny 10.0.0.0/8 is listed before; remove one",
        ),
        (
            "max_new_per_source = \"200\"",
            "max_new_per_source \"200\" is not a rate; write it like \"200/s\"",
        ),
        (
            "affinity_mask4 = 24",
            "affinity_mask has no effect without affinity; add affinity = \"10m\"",
        ),
        (
            "affinity = \"1m\"\naffinity_mask6 = 64",
            "the VIP has no client of this family; remove this affinity_mask",
        ),
        (
            "forward = \"dsr\"\naffinity = \"1m\"\ntrack = \"changes\"",
            "affinity needs every flow recorded; remove track = \"changes\"",
        ),
    ] {
        let error = service_error(lines);
        assert!(error.ends_with(complaint), "{error}\nis not\n{complaint}");
    }
}

#[test]
fn masks_of_affinity_cascade_to_services_of_their_family() {
    let text = "[daemon]\ninterfaces = [\"eth0\"]\n[defaults]\naffinity = \"10m\"\n\
                affinity_mask4 = 24\naffinity_mask6 = 64\n\
                [[service]]\nname = \"a\"\nlisten = \"198.51.100.10:80\"\n\
                [[service]]\nname = \"b\"\nlisten = \"[2001:db8::1]:80\"\naffinity = \"0s\"\n";
    let config = parse(text).unwrap();
    let masks: Vec<_> = config
        .services
        .iter()
        .map(|s| (s.affinity.as_secs(), s.affinity_mask))
        .collect();
    assert_eq!(masks, [(600, 24), (0, 64)]);
}

#[test]
fn timeouts_of_states_have_defaults_and_take_no_nonsense() {
    let with = |section: &str| parse(&format!("{section}\n{MINIMAL}"));
    let config = with("[timeouts]\nclosing = \"30s\"").unwrap();
    let expected = Timeouts {
        closing: Duration::from_secs(30),
        ..Timeouts::default()
    };
    assert_eq!(config.timeouts, expected);
    for (section, complaint) in [
        ("[timeouts]\nclosed = \"0s\"", "closed"),
        ("[timeouts]\ntime_weit = \"9s\"", "time_wait"),
    ] {
        let error = with(section).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    }
}

#[test]
fn a_table_size_is_for_hash_schedulers() {
    let with = |keys: &str| {
        parse(&MINIMAL.replace("[[service]]\n", &format!("[[service]]\n{keys}\n")))
            .map(|config| config.services[0].table_size)
    };
    assert_eq!(with("table_size = 5000"), Ok(5000));
    for (keys, complaint) in [
        (
            "table_size = 5000\nscheduler = \"random\"",
            "is for scheduler maglev",
        ),
        ("table_size = 0", "1 to 2097143"),
    ] {
        let error = with(keys).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
    }
}
