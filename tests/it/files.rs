//! Files in and out of workspaces.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use reqwest::Method;
use serde_json::{Value, json};
use tests::client::{Answer, Client};
use tests::database::Db;
use tests::once;
use tests::script::{Step, steps};
use tests::system::{KEYS, System};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

once!(
    what_a_job_wrote_can_be_fetched,
    files_go_into_a_session_and_out_again,
    no_upload_leaves_the_workspace_or_goes_on_without_end,
);

const SESSION: &str = "/api/v1/sessions/s/files";

/// Sends bytes as they are, so that no client tidies up the path; the status, the head and the body.
async fn raw(client: &Client, head: &str, body: &[u8]) -> (u16, String, String) {
    let address = client.base().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "{head}\r\nhost: x\r\nconnection: close\r\nx-api-key: {}\r\n\r\n",
        KEYS[0]
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server may answer, and close, before it has read everything.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

/// A form with these parts, and what it is announced as.
fn form(parts: &[(&str, &str)]) -> Vec<u8> {
    let part = |(disposition, content): &(&str, &str)| {
        format!("--b\r\ncontent-disposition: form-data; {disposition}\r\n\r\n{content}\r\n")
    };
    (parts.iter().map(part).collect::<String>() + "--b--\r\n").into_bytes()
}

async fn upload(client: &Client, query: &str, parts: &[(&str, &str)]) -> Answer {
    let request = client
        .request(Method::POST, &format!("{SESSION}{query}"))
        .header("content-type", "multipart/form-data; boundary=b")
        .body(form(parts));
    client.send(request).await
}

fn paths(answer: &Answer) -> Vec<&str> {
    let entries = answer.data(200).as_array().unwrap();
    entries
        .iter()
        .map(|entry| entry["path"].as_str().unwrap())
        .collect()
}

/// Everything below a folder.
fn everything(folder: PathBuf) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_dir() {
                waiting.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

async fn what_a_job_wrote_can_be_fetched() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    let write = |file: &str, content: &str| Step::Write {
        file: file.to_owned(),
        content: content.to_owned(),
    };
    let script = steps([
        write("report.md", "# Report\n"),
        write("page.html", "<script>alert(1)</script>"),
        Step::Shell(
            "mkdir -p out; printf 0123456789 > out/data.bin; echo x > .hidden; ln -s / root; mkfifo pipe"
                .to_owned(),
        ),
    ]);
    let id = client.play(&script.answering("written")).await;
    let job = client.finished(&id).await;
    assert_eq!(job["status"], "done", "{job:#}");

    // What the run changed is in its result.
    let changed = job["result"]["files_changed"].as_array().unwrap();
    let told = |file: &Value| (file["path"].as_str().unwrap().to_owned(), file["status"].clone());
    let expected = [".hidden", "out/data.bin", "page.html", "report.md"];
    assert_eq!(
        changed.iter().map(told).collect::<Vec<_>>(),
        expected.map(|path| (path.to_owned(), json!("created"))),
        "{changed:?}"
    );
    assert_eq!(
        (&changed[1]["size"], changed[1]["digest"].as_str().unwrap()),
        (
            &json!(10),
            "sha256:84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
        )
    );

    let files = format!("/api/v1/jobs/{id}/files");
    let listed = client.get(&format!("{files}?recursive=true")).await;
    assert_eq!(paths(&listed), ["out", "out/data.bin", "page.html", "report.md"]);
    assert_eq!(
        listed.json["pagination"],
        json!({"limit": 100, "page": 1, "pages": 1, "total": 4})
    );
    let below = client.get(&format!("{files}?path=out&limit=1000")).await;
    assert_eq!(
        below.data(200),
        &json!([{"name": "data.bin", "path": "out/data.bin", "type": "file", "size": 10}])
    );
    let second = client.get(&format!("{files}?limit=1&page=2")).await;
    assert_eq!(paths(&second), ["page.html"]);
    client
        .get(&format!("{files}?path=none"))
        .await
        .assert_problem(404, "not-found");

    // A file as it is, its type only where a browser can do nothing with it.
    let report = client.get(&format!("{files}/report.md")).await;
    assert_eq!((report.status, report.text.as_str()), (200, "# Report\n"));
    assert_eq!(report.header("content-type"), "text/markdown; charset=utf-8");
    assert_eq!(report.header("x-content-type-options"), "nosniff");
    assert!(
        report
            .header("content-disposition")
            .starts_with("attachment; filename=\"report.md\"")
    );
    let page = client.get(&format!("{files}/page.html")).await;
    assert_eq!(page.header("content-type"), "application/octet-stream");

    // Parts, and what the client has already.
    let data = format!("{files}/out/data.bin");
    let whole = client.get(&data).await;
    let (tag, modified) = (whole.header("etag"), whole.header("last-modified"));
    let asked = async |headers: &[(&str, &str)]| {
        let request = client.request(Method::GET, &data);
        let request = headers
            .iter()
            .fold(request, |request, (name, value)| request.header(*name, *value));
        let answer = client.send(request).await;
        (
            answer.status,
            answer.header("content-range").to_owned(),
            answer.text,
        )
    };
    for (headers, expected) in [
        (&[("range", "bytes=2-4")][..], (206, "bytes 2-4/10", "234")),
        (&[("range", "bytes=-3")], (206, "bytes 7-9/10", "789")),
        (
            &[("range", "bytes=2-4"), ("if-range", tag)],
            (206, "bytes 2-4/10", "234"),
        ),
        (
            &[("range", "bytes=2-4"), ("if-range", "\"other\"")],
            (200, "", "0123456789"),
        ),
        (&[("if-none-match", tag)], (304, "", "")),
        (&[("if-modified-since", modified)], (304, "", "")),
        (
            &[("if-none-match", "\"other\""), ("if-modified-since", modified)],
            (200, "", "0123456789"),
        ),
        (&[("accept-encoding", "gzip")], (200, "", "0123456789")),
    ] {
        let (status, range, text) = asked(headers).await;
        assert_eq!((status, range.as_str(), text.as_str()), expected, "{headers:?}");
    }
    let (status, range, problem) = asked(&[("range", "bytes=10-")]).await;
    assert_eq!((status, range.as_str()), (416, "bytes */10"), "{problem}");

    // What leads out, hangs or is hidden is a problem, however it is written.
    for path in [
        "root/etc/passwd",
        "root",
        "pipe",
        ".hidden",
        "out",
        "..",
        "../home",
        "%2e%2e/home",
        "%2e%2e%2fhome",
        "out/%2E%2E/%2e%2e/home",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "report.md%00",
        "report.md%0a",
        "..%5chome",
        "%ff",
        &"n".repeat(300),
    ] {
        let (status, _, body) = raw(&client, &format!("GET {files}/{path} HTTP/1.1"), b"").await;
        assert_eq!(status, 400, "{path}: {body}");
        assert!(body.contains("\"code\":\"invalid-path\""), "{path}: {body}");
    }
    for path in ["none", "%252e%252e", "out/none"] {
        let (status, _, body) = raw(&client, &format!("GET {files}/{path} HTTP/1.1"), b"").await;
        assert_eq!(status, 404, "{path}: {body}");
    }

    // Everything at once.
    let archive = client
        .request(Method::GET, &format!("/api/v1/jobs/{id}/archive"))
        .send()
        .await
        .unwrap();
    assert_eq!(archive.headers()["content-type"], "application/gzip");
    let folder = system.folder().join("unpacked");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("archive.tar.gz"), archive.bytes().await.unwrap()).unwrap();
    let unpacked = tokio::process::Command::new("tar")
        .args(["-xzf", "archive.tar.gz"])
        .current_dir(&folder)
        .status()
        .await;
    assert!(unpacked.unwrap().success());
    let found = everything(folder.clone());
    let found = found
        .iter()
        .map(|path| path.strip_prefix(&folder).unwrap().to_str().unwrap());
    assert_eq!(
        found.collect::<Vec<_>>(),
        [
            ".hidden",
            "archive.tar.gz",
            "out",
            "out/data.bin",
            "page.html",
            "report.md"
        ]
    );
    assert_eq!(fs::read(folder.join("out/data.bin")).unwrap(), b"0123456789");

    // Until the job's data is removed.
    let gone = client.request(Method::DELETE, &format!("/api/v1/jobs/{id}"));
    assert_eq!(client.send(gone).await.status, 204);
    client.get(&files).await.assert_problem(410, "data-removed");
    client.get(&data).await.assert_problem(410, "data-removed");
}

async fn files_go_into_a_session_and_out_again() {
    let system = System::start(Db::Sqlite).await;
    let client = system.client();
    client.session("s").await;
    // No job has run, so there is nothing yet.
    assert_eq!(paths(&client.get(SESSION).await), [""; 0]);

    let file = "name=\"file\"; filename=\"a.txt\"";
    let stored = upload(&client, "", &[(file, "first")]).await;
    assert_eq!(
        stored.data(201),
        &json!({"path": "a.txt", "size": 5, "name": "a.txt"})
    );
    assert_eq!(client.get(stored.header("location")).await.text, "first");
    let other = upload(&client, "?path=in/here", &[(file, "second")]).await;
    assert_eq!(other.data(201)["path"], "in/here/a.txt");
    let path = "name=\"path\"";
    let third = upload(&client, "", &[(file, "third"), (path, "in/ü b.txt")]).await;
    assert_eq!(third.data(201)["path"], "in/ü b.txt");
    assert_eq!(client.get(third.header("location")).await.text, "third");
    let windows = "name=\"file\"; filename=\"C:\\docs\\w.txt\"";
    assert_eq!(
        upload(&client, "", &[(windows, "")]).await.data(201)["path"],
        "w.txt"
    );
    upload(&client, "", &[(file, "replaced")]).await.data(201);

    // A run finds them, and what it changes is told.
    let look = steps([Step::Shell(
        "cat a.txt > seen; rm w.txt; echo more >> in/here/a.txt".to_owned(),
    )]);
    let body = json!({"message": look.answering("seen").prompt(), "session": "s"});
    let job = client.finished(&client.accepted_body(&body).await).await;
    let changed = job["result"]["files_changed"].as_array().unwrap();
    let told = changed
        .iter()
        .map(|file| (file["path"].as_str().unwrap(), file["status"].as_str().unwrap()));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            ("in/here/a.txt", "modified"),
            ("seen", "created"),
            ("w.txt", "deleted")
        ],
        "{job:#}"
    );
    let seen = format!("{SESSION}/seen");
    assert_eq!(client.get(&seen).await.text, "replaced");
    let of_job = format!("/api/v1/jobs/{}/files/seen", job["id"].as_str().unwrap());
    assert_eq!(client.get(&of_job).await.text, "replaced");

    let remove = async |path: &str| client.send(client.request(Method::DELETE, path)).await;
    assert_eq!(remove(&seen).await.status, 204);
    remove(&seen).await.assert_problem(404, "not-found");
    remove(&format!("{SESSION}/in"))
        .await
        .assert_problem(400, "invalid-path");
    let reader = client
        .with_key(KEYS[2])
        .post(
            "/api/v1/keys",
            &json!({"name": "r", "scopes": ["files:read", "sessions:read"]}),
        )
        .await;
    let reader = client.with_key(reader.data(201)["key"].as_str().unwrap());
    upload(&reader, "", &[(file, "x")])
        .await
        .assert_problem(403, "insufficient-scope");
}

async fn no_upload_leaves_the_workspace_or_goes_on_without_end() {
    let system = System::builder().env("API_BODY_SECONDS", "1").start().await;
    let client = system.client();
    client.session("s").await;
    let file = "name=\"file\"; filename=\"kept\"";
    upload(&client, "", &[(file, "kept")]).await.data(201);
    let sessions = system.folder().join("data/sessions");
    let session = fs::read_dir(&sessions).unwrap().next().unwrap().unwrap().path();
    symlink("/tmp", session.join("workspace/out")).unwrap();
    let before = everything(system.folder().join("data"));

    let path = "name=\"path\"";
    let long = "n".repeat(300);
    for destination in [
        "..",
        "../up",
        "/etc/up",
        "a/../../up",
        "./up",
        ".env",
        ".claude/settings.json",
        "a/.git/hooks/post-checkout",
        "a\0b",
        "a\nb",
        "a\\b",
        "a//b",
        "out/up",
        "out/new/up",
        "kept/below",
        &long,
    ] {
        let refused = upload(&client, "", &[(file, "x"), (path, destination)]).await;
        refused.assert_problem(400, "invalid-path");
    }
    for name in ["..", ".env", "a\tb", &long] {
        let part = format!("name=\"file\"; filename=\"{name}\"");
        let refused = upload(&client, "", &[(&part, "x")]).await;
        assert!(matches!(refused.status, 400), "{name}: {}", refused.text);
    }
    for query in [
        "?path=..",
        "?path=%2e%2e%2fup",
        "?path=/etc",
        "?path=out",
        "?path=.git",
    ] {
        let refused = upload(&client, query, &[(file, "x")]).await;
        refused.assert_problem(400, "invalid-path");
    }
    upload(&client, "?path=a", &[(file, "x"), (path, "b")])
        .await
        .assert_faults(&[("query -> path", "value_error")]);
    upload(&client, "", &[(path, "b")])
        .await
        .assert_faults(&[("body -> file", "missing")]);
    upload(&client, "", &[(file, "x"), (file, "y")])
        .await
        .assert_faults(&[("body -> file", "too_long")]);
    upload(&client, "", &[(file, "x"), ("name=\"mode\"", "777")])
        .await
        .assert_faults(&[("body -> mode", "extra_forbidden")]);
    let many = vec![("name=\"x\"", "y"); 10_000];
    upload(&client, "", &many)
        .await
        .assert_faults(&[("body -> x", "extra_forbidden")]);

    // Too large: said at once where the length is known, and counted where it isn't.
    let large = "x".repeat(11 * 1024 * 1024);
    upload(&client, "", &[(file, &large)])
        .await
        .assert_problem(413, "payload-too-large");
    let head = format!("POST {SESSION} HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=b");
    let chunked = format!(
        "{:x}\r\n{}\r\n0\r\n\r\n",
        form(&[(file, &large)]).len(),
        String::from_utf8(form(&[(file, &large)])).unwrap()
    );
    let (status, _, body) = raw(
        &client,
        &format!("{head}\r\ntransfer-encoding: chunked"),
        chunked.as_bytes(),
    )
    .await;
    assert_eq!(status, 413, "{body}");
    // Without an end, without a beginning, or as something else.
    let open = b"--b\r\ncontent-disposition: form-data; name=\"file\"\r\n\r\nhalf";
    for (more, body, expected) in [
        (format!("content-length: {}", open.len()), &open[..], 400),
        ("content-length: 4".to_owned(), b"none", 400),
        ("content-length: 9".to_owned(), b"--b--\r\n\r\n", 422),
        ("content-length: 0".to_owned(), b"", 400),
        (
            "content-length: 4\r\ncontent-encoding: gzip".to_owned(),
            b"none",
            415,
        ),
    ] {
        let (status, _, answer) = raw(&client, &format!("{head}\r\n{more}"), body).await;
        assert_eq!(status, expected, "{more}: {answer}");
    }
    for content_type in [
        "application/json",
        "multipart/form-data",
        "multipart/mixed; boundary=b",
        "text/plain",
    ] {
        let request = client
            .request(Method::POST, SESSION)
            .header("content-type", content_type);
        client
            .send(request.body(form(&[(file, "x")])))
            .await
            .assert_problem(415, "unsupported-media-type");
    }
    // One that stops arriving is given up.
    let address = client.base().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let unfinished = format!(
        "{head}\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: 1000\r\n\r\n--b\r\n",
        KEYS[0]
    );
    stream.write_all(unfinished.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");

    assert_eq!(
        everything(system.folder().join("data")),
        before,
        "nothing was written"
    );
}
