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
