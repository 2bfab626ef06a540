use super::*;

const PLATFORM: &str = "linux/amd64";

/// A tar file of these files; `-> name` makes a link.
fn tar(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match std::str::from_utf8(bytes).ok().and_then(|text| text.strip_prefix("-> ")) {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                tar.append_link(&mut header, name, target).expect("a link");
            }
            None => {
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, name, bytes.as_slice()).expect("a file");
            }
        }
    }
    tar.into_inner().expect("a tar file")
}

fn config(architecture: &str) -> Vec<u8> {
    format!("{{\"os\": \"linux\", \"architecture\": \"{architecture}\", \"rootfs\": {{}}}}").into_bytes()
}

/// The configuration, the layers and the manifest that come out.
type Outcome = (Vec<u8>, Vec<Vec<u8>>, String);

/// What comes out of an archive, or why nothing does.
fn read(bytes: &[u8], format: Format, wanted: Option<&str>) -> Result<Outcome, String> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("plain.tar");
    plain::write(bytes, &path).map_err(|e| e.to_string())?;
    let contents = Contents::read(&path, dir.path(), format, wanted, PLATFORM).map_err(|e| e.to_string())?;
    let mut written = Vec::new();
    contents.write("demae.local/archive:a", &mut written).expect("written");
    let (mut config, mut layers, mut manifest) = (Vec::new(), Vec::new(), String::new());
    for entry in tar::Archive::new(written.as_slice()).entries().expect("a tar file") {
        let mut entry = entry.expect("a file");
        let name = entry.path().expect("a name").display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("its bytes");
        match name.as_str() {
            "config.json" => config = bytes,
            "manifest.json" => manifest = String::from_utf8(bytes).expect("text"),
            _ => layers.push(bytes),
        }
    }
    Ok((config, layers, manifest))
}

fn saved() -> Vec<u8> {
    let manifest = r#"[{"Config":"a.json","RepoTags":["nginx:latest"],"Layers":["x/layer.tar","y/layer.tar"]},
                       {"Config":"b.json","RepoTags":["web:v1","docker.io/library/web:v2"],"Layers":["y/layer.tar"]}]"#;
    tar(&[
        ("a.json", config("amd64")),
        ("b.json", config("arm64")),
        ("x/layer.tar", b"-> ../y/layer.tar".to_vec()),
        ("y/layer.tar", b"layer".to_vec()),
        ("manifest.json", manifest.into()),
    ])
}

#[test]
fn one_image_of_a_saved_file_is_chosen_and_has_no_name_but_ours() {
    let (found, layers, manifest) = read(&saved(), Format::Docker, Some("nginx:latest")).expect("it is there");
    assert_eq!((found, layers), (config("amd64"), vec![b"layer".to_vec(), b"layer".to_vec()]));
    assert!(manifest.contains("demae.local/archive:a") && !manifest.contains("nginx"), "{manifest}");
    for (wanted, part) in [
        (None, "2 images are in it; write which one after a `#`: nginx:latest, web:v1, docker.io/library/web:v2"),
        (Some("web:v3"), "no image in it is named `web:v3`"),
        (Some("web:v2"), "it is for linux/arm64, and this host is linux/amd64"),
    ] {
        let message = read(&saved(), Format::Docker, wanted).expect_err("it is refused");
        assert!(message.contains(part), "{message}");
    }
    assert!(read(&saved(), Format::Oci, None).expect_err("another format").contains("`docker-archive`"));
}

fn layout() -> Vec<u8> {
    layout_for("amd64")
}

fn layout_for(architecture: &str) -> Vec<u8> {
    let index = r#"{"manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:1",
        "annotations": {"org.opencontainers.image.ref.name": "web:v1"}}]}"#;
    let inner = r#"{"manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:8", "platform": {"os": "unknown", "architecture": "unknown"}},
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:9", "platform": {"os": "linux", "architecture": "s390x"}},
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:2", "platform": {"os": "linux", "architecture": "amd64"}}]}"#;
    let manifest = r#"{"config": {"digest": "sha256:3"}, "layers": [{"digest": "sha256:4"}, {"digest": "sha256:5"}]}"#;
    let zstd = ruzstd::encoding::compress_to_vec(b"one".as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    tar(&[
        ("oci-layout", b"{}".to_vec()),
        ("index.json", index.into()),
        ("./blobs/sha256/1", inner.replace("amd64", architecture).into()),
        ("blobs/sha256/2", manifest.into()),
        ("blobs/sha256/3", config("amd64")),
        ("blobs/sha256/4", zstd),
        ("blobs/sha256/5", b"two".to_vec()),
    ])
}

#[test]
fn a_layout_is_turned_into_a_saved_file_for_this_platform() {
    for wanted in [None, Some("web:v1")] {
        let (found, layers, _) = read(&layout(), Format::Oci, wanted).expect("it is there");
        assert_eq!((found, layers), (config("amd64"), vec![b"one".to_vec(), b"two".to_vec()]));
    }
    let message = read(&layout_for("mips"), Format::Oci, None).expect_err("another platform");
    assert!(message.contains("it is for linux/s390x, linux/mips, and this host is"), "{message}");
}

#[test]
fn compression_is_taken_away_and_damage_is_noticed() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&layout()).expect("written");
    let gzip = gzip.finish().expect("written");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let whole = layout();
    let (begin, end) = whole.split_at(2000);
    // Two frames, as compressors with several threads write them.
    let zstd = [begin, end].map(|part| ruzstd::encoding::compress_to_vec(part, level)).concat();
    for whole in [layout(), gzip, zstd] {
        assert_eq!(read(&whole, Format::Oci, None).expect("it is there").1.len(), 2);
        for cut in [0, 3, whole.len() / 3, whole.len() / 2] {
            assert!(read(&whole[..cut], Format::Oci, None).is_err(), "{cut} of {} bytes", whole.len());
        }
    }
    assert!(read(b"root:x:0:0", Format::Docker, None).is_err_and(|message| !message.contains("root")));
}

#[test]
fn headers_do_not_fill_the_memory() {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_size(64 << 20);
    header.set_path("long").expect("a path");
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(bytes.len() + (64 << 20), b'9');
    let message = read(&bytes, Format::Docker, None).expect_err("it is refused");
    assert!(message.contains("too long"), "{message}");
}
