//! What each forward mode can do, and what is refused because it cannot.

use super::*;

/// A service in `mode` at `listen` with one backend, whose address stands in line 8.
fn service(mode: &str, listen: &str, backend: &str) -> Result<Config, String> {
    parse(&format!(
        "[daemon]\ninterfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nlisten = \"{listen}\"\n\
         forward = \"{mode}\"\n[[service.backend]]\naddress = \"{backend}\"\n"
    ))
}

#[test]
fn every_mode_has_its_word() {
    for (word, number) in [
        ("nat", forward::NAT),
        ("dnat", forward::DNAT),
        ("dsr", forward::DSR),
        ("ipip", forward::IPIP),
        ("gue", forward::GUE),
    ] {
        let config = service(word, "198.51.100.10:80", "10.0.0.11").expect(word);
        assert_eq!(config.services[0].forward, number, "{word}");
        let port = config.services[0].backends[0].address.port();
        assert_eq!(port, 80, "{word}: a backend has the VIP's port by default");
    }
    let error = service("tunnel", "198.51.100.10:80", "10.0.0.11").unwrap_err();
    assert!(
        error.starts_with("lb.toml:6: service \"web\": forward \"tunnel\" is unknown;"),
        "{error}"
    );
}

#[test]
fn a_port_differs_only_where_the_mode_can_rewrite_it() {
    for (vip, backend) in [
        ("198.51.100.10:80", "10.0.0.11:8080"),
        ("[2001:db8::1]:80", "[2001:db8:1::11]:8080"),
    ] {
        for mode in ["nat", "dnat"] {
            service(mode, vip, backend).expect(mode);
        }
        for mode in ["dsr", "ipip", "gue"] {
            let error = service(mode, vip, backend).expect_err(mode);
            let expected = format!(
                "lb.toml:8: service \"web\": backend \"{backend}\": its port 8080 is not the VIP's 80, and forward \"{mode}\" leaves ports as they are;"
            );
            assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
            assert_eq!(error.lines().count(), 1, "{error}");
            service(mode, vip, &backend.replace("8080", "80")).expect(mode);
        }
    }
}

#[test]
fn the_family_differs_only_where_the_packet_travels_inside_another() {
    for (vip, backend) in [
        ("198.51.100.10:80", "2001:db8:1::11"),
        ("[2001:db8::1]:80", "10.0.0.11"),
    ] {
        for mode in ["ipip", "gue"] {
            let config = service(mode, vip, backend).expect(mode);
            assert_eq!(
                config.services[0].backends[0].address.ip().to_string(),
                backend
            );
        }
        for mode in ["nat", "dnat", "dsr"] {
            let error = service(mode, vip, backend).expect_err(mode);
            assert!(
                error.starts_with("lb.toml:8: service \"web\": backend ")
                    && error.contains(&format!("forward \"{mode}\" needs the same family")),
                "{error}"
            );
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}

#[test]
fn the_mode_cascades_from_the_defaults() {
    let config = parse(
        "[daemon]\ninterfaces = [\"eth0\"]\n[defaults]\nforward = \"ipip\"\n\
         [[service]]\nname = \"a\"\nlisten = \"198.51.100.10:80\"\n\
         [[service]]\nname = \"b\"\nlisten = \"198.51.100.11:80\"\nforward = \"dsr\"\n",
    )
    .unwrap();
    let modes: Vec<u8> = config.services.iter().map(|s| s.forward).collect();
    assert_eq!(modes, [forward::IPIP, forward::DSR]);
}

/// A service in `dnat`, with further lines from line 7 on.
fn dnat(lines: &str) -> Result<Config, String> {
    parse(&with_service(&format!("forward = \"dnat\"\n{lines}")))
}

/// The backend that such a service has, in two lines.
const BACKEND: &str = "[[service.backend]]\naddress = \"10.0.0.11:8080\"";

#[test]
fn with_a_gateway_dnat_need_not_record_its_flows() {
    let config = dnat(BACKEND).unwrap();
    assert_eq!(config.services[0].gateway, None);
    assert!(!config.services[0].is_stateless());
    for more in [
        "",
        "track = \"changes\"\n",
        "scheduler = \"source-hash\"\n",
        "max_new_per_source = \"9/s\"\n",
    ] {
        let lines = format!("gateway = \"192.0.2.1\"\n{more}{BACKEND}");
        let service = dnat(&lines).expect(more).services.remove(0);
        assert_eq!(service.gateway, Some([192, 0, 2, 1].into()));
        assert!(service.is_stateless(), "{more}");
    }
    let text = with_service("forward = \"dnat\"\ngateway = \"2001:db8::fe\"\n");
    let config = parse(&text.replace("198.51.100.10", "[2001:db8::1]")).unwrap();
    assert_eq!(
        config.services[0].gateway,
        Some("2001:db8::fe".parse().unwrap())
    );
}

#[test]
fn mistakes_about_a_gateway_name_line_and_remedy() {
    for (lines, complaint) in [
        ("gateway = 5", "7: service \"web\": gateway is an integer"),
        (
            "gateway = \"router\"",
            "7: service \"web\": gateway \"router\" is not an address; write it like \"192.0.2.1\"",
        ),
        (
            "gateway = \"192.0.2.1:80\"",
            "7: service \"web\": gateway \"192.0.2.1:80\" is not an address; write it like",
        ),
        (
            "gateway = \"0.0.0.0\"",
            "7: service \"web\": gateway \"0.0.0.0\" is an unspecified address; use a unicast",
        ),
        (
            "gateway = \"127.0.0.1\"",
            "7: service \"web\": gateway \"127.0.0.1\" is a loopback address; use a unicast",
        ),
        (
            "gateway = \"224.0.0.1\"",
            "7: service \"web\": gateway \"224.0.0.1\" is a multicast address; use a unicast",
        ),
        (
            "gateway = \"2001:db8::1\"",
            "7: service \"web\": gateway \"2001:db8::1\" is IPv6 but the VIP is IPv4; write the \
             router's IPv4 address",
        ),
        (
            "gateway = \"198.51.100.10\"",
            "7: service \"web\": gateway \"198.51.100.10\" is the VIP; write the address of the router",
        ),
        (
            "gateway = \"10.0.0.11\"",
            "7: service \"web\": gateway \"10.0.0.11\" is backend \"10.0.0.11:8080\"; write the address",
        ),
        (
            "gateway = \"192.0.2.1\"\ntrack = \"all\"",
            "7: service \"web\": gateway is there so that flows need no record, but track = \"all\" \
             records them all; remove one",
        ),
        (
            "scheduler = \"round-robin\"\ngateway = \"192.0.2.1\"\ntrack = \"changes\"",
            "8: service \"web\": scheduler \"round-robin\" needs every flow recorded; remove gateway",
        ),
        (
            "affinity = \"1m\"\ngateway = \"192.0.2.1\"",
            "8: service \"web\": affinity needs every flow recorded; remove gateway",
        ),
        (
            "connect_timeout = \"1s\"\ngateway = \"192.0.2.1\"",
            "8: service \"web\": connect_timeout needs every flow recorded; remove gateway",
        ),
        (
            "protocol = \"udp\"\nmax_new_per_source = \"9/s\"\ngateway = \"192.0.2.1\"",
            "9: service \"web\": max_new_per_source of a udp service needs every flow recorded; \
             remove gateway",
        ),
        (
            "track = \"changes\"",
            "7: service \"web\": forward \"dnat\" needs every flow recorded; add gateway = \
             \"192.0.2.1\", the router that clients come through, or remove track = \"changes\"",
        ),
    ] {
        let error = dnat(&format!("{lines}\n{BACKEND}")).expect_err(lines);
        let expected = format!("lb.toml:{complaint}");
        assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let limited = format!("gateway = \"192.0.2.1\"\n{BACKEND}\nmax_connections = 9");
    assert_eq!(
        dnat(&limited).unwrap_err(),
        "lb.toml:7: service \"web\": max_connections needs every flow recorded; remove gateway"
    );
    for mode in ["nat", "dsr", "ipip", "gue"] {
        let lines = format!("forward = \"{mode}\"\ngateway = \"192.0.2.1\"");
        let error = parse(&with_service(&lines)).expect_err(mode);
        assert_eq!(
            error,
            "lb.toml:7: service \"web\": gateway is for forward \"dnat\", where answers to clients \
             come through here; remove it"
        );
    }
    let error = parse(&with_service("track = \"changes\"")).unwrap_err();
    assert!(
        error.ends_with("forward \"nat\" needs every flow recorded; remove track = \"changes\"")
    );
    let text = with_service("forward = \"dnat\"\ngateway = \"198.51.100.20\"");
    let other = "[[service]]\nname = \"other\"\nlisten = \"198.51.100.20:80\"";
    let error = parse(&format!("{text}\n{other}\n")).unwrap_err();
    assert_eq!(
        error,
        "lb.toml:7: service \"web\": gateway 198.51.100.20 is the VIP of service \"other\"; write the address of \
         the router that clients come through"
    );
    for ports in ["80-81", "*"] {
        let text = with_service("forward = \"dnat\"\ngateway = \"192.0.2.1\"");
        let error = parse(&text.replace(":80\"", &format!(":{ports}\""))).unwrap_err();
        assert!(
            error.starts_with(
                "lb.toml:7: service \"web\": gateway needs a single port to listen on"
            ),
            "{error}"
        );
    }
}

#[test]
fn a_gateway_counts_with_what_the_defaults_say() {
    let with = |key: &str, lines: &str| {
        let service = with_service(&format!("forward = \"dnat\"\n{lines}"));
        parse(&format!("[defaults]\n{key}\n{service}"))
    };
    let gateway = "gateway = \"192.0.2.1\"";
    assert_eq!(
        with("track = \"all\"", gateway).unwrap_err(),
        "lb.toml:9: service \"web\": gateway is there so that flows need no record, but track = \"all\" \
         in [defaults] records them all; remove it, or add track = \"changes\""
    );
    let both = format!("{gateway}\ntrack = \"changes\"");
    assert!(with("track = \"all\"", &both).unwrap().services[0].is_stateless());
    assert_eq!(
        with("connect_timeout = \"1s\"", gateway).unwrap_err(),
        "lb.toml:9: service \"web\": connect_timeout needs every flow recorded; remove gateway"
    );
    assert_eq!(
        with(gateway, "").unwrap_err().split(';').next(),
        Some("lb.toml:2: defaults: unknown key \"gateway\"")
    );
}

/// A service in `dnat` with a gateway, whose backend stands in line 9, and another one, which `lines` are of
/// from line 13 on.
fn sharing(listen: &str, lines: &str, backend: &str) -> Result<Config, String> {
    dnat(&format!(
        "gateway = \"192.0.2.1\"\n{BACKEND}\n[[service]]\nname = \"other\"\nlisten = \"{listen}\"\n\
         {lines}\n[[service.backend]]\naddress = \"{backend}\"\n"
    ))
}

#[test]
fn answers_are_told_apart_by_the_backend_they_come_from() {
    let (nat, dnat) = ("forward = \"nat\"", "forward = \"dnat\"");
    let gateway = "forward = \"dnat\"\ngateway = \"192.0.2.2\"";
    for (listen, lines, backend) in [
        ("198.51.100.11:80", nat, "10.0.0.11:8080"),
        ("198.51.100.10:81", dnat, "10.0.0.11:8080"),
        ("198.51.100.11:80", gateway, "10.0.0.11:8080"),
        ("198.51.100.11:8000-8100", nat, "10.0.0.11"),
        ("198.51.100.11:*", dnat, "10.0.0.11"),
    ] {
        let error = sharing(listen, lines, backend).unwrap_err();
        let line = 14 + lines.lines().count();
        let expected = format!(
            "lb.toml:{line}: service \"other\": backend \"{backend}\": answers from 10.0.0.11:8080 are for \
             service \"web\", because of its gateway and the backend in line 9; use another address or port, \
             or remove that gateway"
        );
        assert_eq!(error, expected);
    }
    for (listen, lines, backend) in [
        ("198.51.100.11:80", dnat, "10.0.0.11:8081"),
        ("198.51.100.11:80", gateway, "10.0.0.12:8080"),
        ("198.51.100.11:8081-8100", nat, "10.0.0.11"),
        (
            "198.51.100.11:80",
            "protocol = \"udp\"\nforward = \"dnat\"",
            "10.0.0.11:8080",
        ),
        // Its answers do not come through here.
        ("198.51.100.11:8080", "forward = \"dsr\"", "10.0.0.11"),
    ] {
        let result = sharing(listen, lines, backend);
        assert!(result.is_ok(), "{listen}: {result:?}");
    }
}

#[test]
fn what_answers_come_from_needs_room_among_the_listeners() {
    let with = |listeners: u32| {
        let lines = format!(
            "gateway = \"192.0.2.1\"\n{BACKEND}\n[[service.backend]]\naddress = \"10.0.0.12\"\n\
             [limits]\nlisteners = {listeners}"
        );
        dnat(&lines)
    };
    assert_eq!(
        with(4).unwrap_err(),
        "lb.toml:12: limits: listeners = 4 is too small for 1 ports on IPv4 VIPs and 2 backends of \
         services with a gateway, and their replacements; write listeners = 5 or more"
    );
    assert!(with(5).is_ok());
}

fn daemon(line: &str) -> Result<Config, String> {
    parse(&format!(
        "[daemon]\ninterfaces = [\"eth0\"]\n{line}\n[[service]]\nname = \"web\"\nlisten = \"198.51.100.10:80\"\n"
    ))
}

#[test]
fn outer_sources_and_the_port_of_gue_are_configured() {
    let config = daemon("encap_source = [\"10.99.0.0/16\", \"2001:db8:99::/96\"]").unwrap();
    let source = &config.daemon.encap_source;
    assert_eq!(source.v4, Some(("10.99.0.0".parse().unwrap(), 16)));
    assert_eq!(source.v6, Some(("2001:db8:99::".parse().unwrap(), 96)));
    let config = daemon("encap_source = [\"2001:db8:99::/96\"]\ngue_port = 5555").unwrap();
    assert_eq!(config.daemon.encap_source.v4, None);
    assert_eq!(config.daemon.gue_port, 5555);
}

#[test]
fn mistakes_in_outer_sources_name_line_network_and_remedy() {
    for (value, complaint) in [
        (
            "[\"10.99.0.1/16\"]",
            "encap_source \"10.99.0.1/16\" has bits set behind its prefix",
        ),
        (
            "[\"10.99.0.0\"]",
            "encap_source \"10.99.0.0\" is not a network",
        ),
        (
            "[\"10.99.0.0/x\"]",
            "encap_source \"10.99.0.0/x\" is not a network",
        ),
        (
            "[\"10.99.0/16\"]",
            "encap_source \"10.99.0/16\" is not a network",
        ),
        (
            "[\"10.99.0.0/32\"]",
            "encap_source \"10.99.0.0/32\" has a prefix that leaves too few or too many bits",
        ),
        (
            "[\"0.0.0.0/0\"]",
            "encap_source \"0.0.0.0/0\" has a prefix that leaves too few or too many bits",
        ),
        (
            "[\"2001:db8::/128\"]",
            "encap_source \"2001:db8::/128\" has a prefix that leaves too few or too many bits",
        ),
        (
            "[\"2001:db8::1/64\"]",
            "encap_source \"2001:db8::1/64\" has bits set behind its prefix",
        ),
        (
            "[\"10.98.0.0/16\", \"10.99.0.0/16\"]",
            "encap_source \"10.99.0.0/16\" is a second IPv4 network",
        ),
        (
            "[\"2001:db8:98::/64\", \"2001:db8:99::/64\"]",
            "encap_source \"2001:db8:99::/64\" is a second IPv6 network",
        ),
    ] {
        assert_eq!(
            daemon(&format!("encap_source = {value}")).expect_err(value),
            format!(
                "lb.toml:3: daemon: {complaint}; write one network of each family, such as [\"10.99.0.0/16\", \"2001:db8:99::/96\"]"
            )
        );
    }
    for (line, complaint) in [
        (
            "encap_source = 5",
            "encap_source is an integer, but must be a list",
        ),
        ("encap_source = [5]", "encap_source"),
        (
            "gue_port = 0",
            "gue_port 0 is out of range; choose 1 to 65535",
        ),
        (
            "gue_port = 65536",
            "gue_port 65536 is out of range; choose 1 to 65535",
        ),
        ("gue_port = \"6080\"", "gue_port is a string"),
    ] {
        let error = daemon(line).expect_err(line);
        let expected = format!("lb.toml:3: daemon: {complaint}");
        assert!(error.starts_with(&expected), "{error}\nis not\n{expected}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn clients_on_this_host_are_led_unless_told_otherwise() {
    let config = daemon("").unwrap();
    assert_eq!(config.daemon.local_clients, None);
    assert!(!config.daemon.asks_for_local_clients());
    let config = daemon("cgroup = \"/sys/fs/cgroup/app\"").unwrap();
    assert!(config.daemon.asks_for_local_clients());
    for (line, complaint) in [
        ("local_clients = \"yes\"", "local_clients is a string"),
        (
            "cgroup = \"app\"",
            "cgroup \"app\" is not an absolute path; begin with \"/\"",
        ),
        (
            "local_clients = false\ncgroup = \"/sys/fs/cgroup\"",
            "cgroup is for clients on this host, which local_clients = false leaves alone; remove one",
        ),
    ] {
        let error = daemon(line).expect_err(line);
        assert!(error.contains(complaint), "{error}\nlacks\n{complaint}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn the_mark_of_checks_leaves_room_for_their_numbers() {
    assert_eq!(daemon("").unwrap().daemon.probe_mark, 0x51c0_0000);
    let config = daemon("probe_mark = 0x00100000").unwrap();
    assert_eq!(config.daemon.probe_mark, 0x0010_0000);
    for (line, complaint) in [
        (
            "probe_mark = 0x51c00001",
            "probe_mark 0x51c00001 has one of its low 20 bits set",
        ),
        (
            "probe_mark = 0",
            "probe_mark 0 is out of range; choose 1048576 to 4294967295",
        ),
        ("probe_mark = \"0x1\"", "probe_mark is a string"),
    ] {
        let error = daemon(line).expect_err(line);
        assert!(error.contains(complaint), "{error}\nlacks\n{complaint}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
