//! `examples/node-mysql` from its real packages: two Express applications on one MariaDB database,
//! behind one VIP.
//!
//! b1 and b2 run the applications, b3 the database; b4 answers no SYN.

use serde_json::Value;
use sluice_tests::topology::{Options, Topology, finish, wait_until};
use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// As `sluice.toml` has it.
const VIP: &str = "203.0.113.10:80";
/// A service in front of a backend that answers no SYN.
const SILENT_VIP: &str = "203.0.113.10:81";
/// Shorter than the five seconds after which Node closes an idle connection itself.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
const ALLOWED_LATENESS: Duration = Duration::from_secs(2);

#[test]
fn two_applications_on_one_database_behind_one_vip() {
    let net = Topology::new(Options {
        backends: 4,
        ..Options::default()
    });
    let application = install(&net);
    start_database(&net);
    start_application(&net, &application, "app1");
    let app2 = start_application(&net, &application, "app2");
    never_answer(&net, "b4", 3003);
    net.daemon(&configuration(&net));
    net.wait_backends_up(Some("web"), 2);

    answers_alternate(&net, 20);
    users_are_shared(&net);
    bad_input_is_refused(&net);
    slow_handshakes_fail(&net);
    idle_connections_end(&net);

    net.kill(app2);
    wait_until("app2 to be found dead", || {
        backend(&net, "app2")["state"] == "down"
    });
    for number in 1..=50 {
        assert_eq!(
            who_answers(&net),
            "app1",
            "request {number} after the death"
        );
    }
    start_application(&net, &application, "app2");
    net.wait_backends_up(Some("web"), 2);
    answers_alternate(&net, 20);
}

/// Connections are placed strictly in turn.
#[track_caller]
fn answers_alternate(net: &Topology, requests: usize) {
    let answers: Vec<_> = (0..requests).map(|_| who_answers(net)).collect();
    let other = |name: &str| if name == "app1" { "app2" } else { "app1" };
    for pair in answers.windows(2) {
        assert_eq!(pair[1], other(&pair[0]), "not in turn: {answers:?}");
    }
}

/// What is posted through one application is read through the other.
#[track_caller]
fn users_are_shared(net: &Topology) {
    let ada = r#"{"name": "Ada", "email": "ada@example.com"}"#;
    let (status, created) = request(net, "/users", Some(ada));
    assert_eq!(status, 201, "{created}");
    let (status, listed) = request(net, "/users", None);
    assert_eq!(status, 200, "{listed}");
    assert_ne!(created["app"], listed["app"], "both from one application");
    assert_eq!(listed["users"], Value::Array(vec![created["user"].clone()]));
    assert_eq!(listed["users"][0]["email"], "ada@example.com");

    let (status, refused) = request(net, "/users", Some(ada));
    assert_eq!(status, 409, "the email is taken: {refused}");
}

#[track_caller]
fn bad_input_is_refused(net: &Topology) {
    for body in [
        "{}",
        r#"{"name": "Bob"}"#,
        r#"{"email": "bob@example.com"}"#,
        r#"{"name": "", "email": "bob@example.com"}"#,
        r#"{"name": 7, "email": "bob@example.com"}"#,
        r#"{"name": "Bob""#,
    ] {
        let (status, answer) = request(net, "/users", Some(body));
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer["error"].is_string(), "{body}: {answer}");
    }
    let (_, listed) = request(net, "/users", None);
    assert_eq!(
        listed["users"].as_array().map(Vec::len),
        Some(1),
        "{listed}"
    );
}

/// A handshake that takes longer than `connect_timeout` is refused, and counted.
#[track_caller]
fn slow_handshakes_fail(net: &Topology) {
    let url = format!("http://{SILENT_VIP}/");
    let started = Instant::now();
    let curl = net.run(
        "client",
        "curl",
        &["--silent", "--show-error", "--max-time", "10", &url],
    );
    let took = started.elapsed();
    // curl's "failed to connect to host".
    assert_eq!(curl.code, 7, "{}", curl.report());
    assert!(
        curl.stderr.contains("refused") || curl.stderr.contains("Couldn't connect"),
        "{}",
        curl.report()
    );
    // The client repeats its SYN after one second, then after another two; one of them is
    // answered with the reset.
    assert!(
        took >= Duration::from_millis(950) && took < Duration::from_millis(3500),
        "refused after {took:?}"
    );
    let drops = net.json(&["stats", "--drops"]);
    let refused = find(&drops, "reason", "connect_timeout");
    assert!(refused["packets"].as_u64() > Some(0), "{drops}");
}

/// A connection that is silent for `idle_timeout` is forgotten, and its next use fails at once.
#[track_caller]
fn idle_connections_end(net: &Topology) {
    let mut connection = net
        .on("client", || TcpStream::connect(VIP))
        .expect("the VIP takes connections");
    let source = connection.local_addr().expect("an address").to_string();
    connection
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a time limit");
    let ask = b"GET / HTTP/1.1\r\nHost: example\r\n\r\n";
    connection.write_all(ask).expect("the request is sent");
    let mut answer = [0; 4096];
    let length = connection.read(&mut answer).expect("it is answered");
    assert!(answer[..length].starts_with(b"HTTP/1.1 200"));
    let last_used = Instant::now();

    let listed = || {
        let connections = net.json(&["conn", "list"]);
        let connections = connections.as_array().cloned().unwrap_or_default();
        connections.into_iter().find(|c| c["source"] == *source)
    };
    let flow = listed().expect("the connection is listed");
    assert_eq!(flow["state"], "ESTABLISHED", "{flow}");
    wait_until("the idle connection to be forgotten", || {
        thread::sleep(Duration::from_millis(30));
        listed().is_none()
    });
    let lived = last_used.elapsed();
    assert!(
        lived + Duration::from_millis(100) > IDLE_TIMEOUT
            && lived < IDLE_TIMEOUT + ALLOWED_LATENESS,
        "forgotten after {lived:?}"
    );

    // The first packet is what the reset answers, so the write itself may succeed.
    let used_again = connection
        .write_all(ask)
        .and_then(|()| connection.read(&mut answer));
    let error = used_again.expect_err("the connection has ended");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[track_caller]
fn who_answers(net: &Topology) -> String {
    let (status, answer) = request(net, "/", None);
    assert_eq!(status, 200, "{answer}");
    let name = answer["app"]
        .as_str()
        .expect("it says who it is")
        .to_owned();
    let port = if name == "app1" { 3001 } else { 3002 };
    assert_eq!(answer["port"], port, "{answer}");
    name
}

/// One request through the VIP on a connection of its own, with a JSON body if any.
#[track_caller]
fn request(net: &Topology, path: &str, body: Option<&str>) -> (u16, Value) {
    let url = format!("http://{VIP}{path}");
    let mut arguments = vec!["--silent", "--show-error", "--max-time", "5"];
    arguments.extend(["--write-out", "\n%{http_code}", &url]);
    if let Some(body) = body {
        arguments.extend(["--header", "content-type: application/json", "--data", body]);
    }
    let output = net.run("client", "curl", &arguments).ok();
    let (answer, status) = output.rsplit_once('\n').expect("two lines");
    let answer = serde_json::from_str(answer).unwrap_or_else(|e| panic!("{answer:?}: {e}"));
    (status.parse().expect("a status"), answer)
}

fn backend(net: &Topology, name: &str) -> Value {
    find(&net.json(&["backend", "list", "web"]), "name", name)
}

#[track_caller]
fn find(list: &Value, key: &str, value: &str) -> Value {
    let objects = list.as_array().expect("a listing is an array");
    let object = objects.iter().find(|object| object[key] == value);
    object
        .unwrap_or_else(|| panic!("no {value} in {list}"))
        .clone()
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/node-mysql")
}

/// The example's own `sluice.toml`, with what belongs to this machine and this test put in.
fn configuration(net: &Topology) -> PathBuf {
    let mut text = fs::read_to_string(example().join("sluice.toml")).expect("the example's file");
    let mut put = |old: &str, new: &str| {
        assert!(text.contains(old), "sluice.toml without {old:?}");
        text = text.replace(old, new);
    };
    put("[daemon]\ninterfaces = [\"eth0\"]\n", &net.daemon_section());
    put(
        "idle_timeout = \"10m\"",
        &format!("idle_timeout = \"{IDLE_TIMEOUT:?}\""),
    );
    text.push_str(&format!(
        "\n[[service]]\nname = \"silent\"\nlisten = \"{SILENT_VIP}\"\nprotocol = \"tcp\"\n\
         forward = \"nat\"\nscheduler = \"round-robin\"\nconnect_timeout = \"1s\"\n\
         [service.health]\ntype = \"none\"\n\
         [[service.backend]]\naddress = \"{}:3003\"\n",
        net.v4("b4")
    ));
    net.config("sluice.toml", &text)
}

/// Installs the application's packages in a copy; its directory is returned.
fn install(net: &Topology) -> PathBuf {
    let directory = net.dir().join("application");
    fs::create_dir(&directory).expect("a directory in our own");
    for file in ["app.js", "package.json", "package-lock.json", ".npmrc"] {
        fs::copy(example().join(file), directory.join(file))
            .unwrap_or_else(|e| panic!("examples/node-mysql/{file}: {e}"));
    }
    finish(Command::new("npm").arg("ci").current_dir(&directory)).ok();
    directory
}

/// Starts app1 on b1 or app2 on b2, and waits until it answers. Its process number is returned.
fn start_application(net: &Topology, directory: &Path, name: &str) -> u32 {
    let (host, port) = if name == "app1" {
        ("b1", "3001")
    } else {
        ("b2", "3002")
    };
    let mut node = net.command(host, "node");
    node.arg("app.js")
        .current_dir(directory)
        .env("NAME", name)
        .env("PORT", port)
        .env("DB_HOST", net.v4("b3").to_string());
    let pid = net.spawn(name, node);
    wait_until(&format!("{name} to answer"), || {
        assert_eq!(net.exit_code(pid), None, "{name} ended:\n{}", net.log(name));
        let health = format!("http://127.0.0.1:{port}/health");
        net.curl(host, &[&health]).code == 0
    });
    pid
}

/// Starts MariaDB on b3, with a data directory of its own and the example's schema.
fn start_database(net: &Topology) {
    let data = format!("--datadir={}", net.dir().join("mariadb").display());
    let socket = format!("--socket={}", net.dir().join("mariadb.sock").display());
    finish(Command::new("mariadb-install-db").args([
        "--no-defaults",
        "--user=root",
        "--skip-test-db",
        "--auth-root-authentication-method=socket",
        &data,
    ]))
    .ok();
    let mut server = net.command("b3", "mariadbd");
    server
        .args([
            "--no-defaults",
            "--user=root",
            "--port=3306",
            &data,
            &socket,
        ])
        .arg(format!("--bind-address={}", net.v4("b3")))
        .arg(format!(
            "--pid-file={}",
            net.dir().join("mariadb.pid").display()
        ))
        .arg(format!(
            "--init-file={}",
            example().join("schema.sql").display()
        ));
    let pid = net.spawn("mariadb", server);
    wait_until("MariaDB to answer", || {
        assert_eq!(
            net.exit_code(pid),
            None,
            "MariaDB ended:\n{}",
            net.log("mariadb")
        );
        let ask = [
            "--no-defaults",
            &socket,
            "--execute=SELECT 1 FROM my_db.users",
        ];
        net.run("b3", "mariadb", &ask).code == 0
    });
}

/// Lets a host drop every packet for a port, so that no connection to it is ever established.
fn never_answer(net: &Topology, host: &str, port: u16) {
    let rules = format!(
        "add table inet silent; \
         add chain inet silent input {{ type filter hook input priority 0; }}; \
         add rule inet silent input tcp dport {port} drop"
    );
    net.run(host, "nft", &[&rules]).ok();
}
