//! What is written is read back by decoders, and the index of MP4 box by box.

use std::{collections::BTreeMap, fs, io::BufReader};

use openh264::{decoder::Decoder, formats::YUVSource};

use super::*;
use crate::names::{Medium, Names};

const NAMES: [&str; 4] = ["v.mp4", "v.gif", "v.webp", "v.png"];

/// Smooth frames that move.
fn frames(width: usize, height: usize, count: usize) -> Vec<Vec<u8>> {
    let pixel = |t: usize, x: usize, y: usize| {
        let (t, x, y) = (t as f32 / 8., x as f32, y as f32);
        [(x / 19. + t).sin(), (y / 15. - t).sin(), ((x + y) / 23. + 2. * t).sin()]
            .map(|wave| (128. + 90. * wave) as u8)
    };
    let at = |t| (0..height).flat_map(move |y| (0..width).flat_map(move |x| pixel(t, x, y)));
    (0..count).map(|t| at(t).collect()).collect()
}

fn text() -> Vec<(&'static str, String)> {
    vec![("prompt", "a <red> ♥ & more".into()), ("seed", "7".into())]
}

fn write(path: &Path, (width, height): (usize, usize), fps: f64, frames: &[Vec<u8>]) -> PathBuf {
    let mut video = Video::create(path, width, height, fps, &text()).unwrap();
    for frame in frames {
        video.frame(frame).unwrap();
    }
    video.finish().unwrap()
}

fn psnr(found: &[u8], expected: &[u8]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
    let sum: f64 = found.iter().zip(expected).map(square).sum();
    10. * (255f64.powi(2) * found.len() as f64 / sum).log10()
}

/// What is in `dir`, by name, without folders' contents.
fn listed(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// All bytes of a video, of files in a folder one after the other.
fn bytes(path: &Path) -> Vec<u8> {
    if !path.is_dir() {
        return fs::read(path).unwrap();
    }
    listed(path).iter().flat_map(|name| fs::read(path.join(name)).unwrap()).collect()
}

/// Bodies of boxes by their paths, such as `moov/trak/tkhd`, with where they begin.
fn boxes(file: &[u8]) -> BTreeMap<String, (usize, Vec<u8>)> {
    fn walk(at: usize, bytes: &[u8], path: &str, found: &mut BTreeMap<String, (usize, Vec<u8>)>) {
        let mut from = 0;
        while from < bytes.len() {
            let size = u32_at(bytes, from) as usize;
            assert!(size >= 8 && from + size <= bytes.len(), "{path}: a box of {size} bytes");
            // © in names is Latin-1.
            let kind: String = bytes[from + 4..from + 8].iter().map(|&b| char::from(b)).collect();
            let path = format!("{path}{kind}");
            // What stands before a container's children.
            let skip = match path.rsplit('/').next().unwrap_or_default() {
                "moov" | "trak" | "mdia" | "minf" | "stbl" | "udta" | "ilst" | "©cmt" => Some(0),
                "meta" => Some(4),
                "stsd" => Some(8),
                "avc1" => Some(78),
                _ => None,
            };
            let body = &bytes[from + 8..from + size];
            if let Some(skip) = skip {
                walk(at + from + 8 + skip, &body[skip..], &format!("{path}/"), found);
            }
            assert!(found.insert(path.clone(), (at + from + 8, body.to_vec())).is_none(), "{path}");
            from += size;
        }
    }
    let mut found = BTreeMap::new();
    walk(0, file, "", &mut found);
    found
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// BT.709 in limited range to RGB, chroma between samples as H.264 places them by default.
fn rgb(yuv: &impl YUVSource) -> Vec<u8> {
    let (width, height) = yuv.dimensions();
    let (row_y, row_u, row_v) = yuv.strides();
    let chroma = |plane: &[u8], row: usize, x: usize, y: usize| {
        let at = |x: usize, y: usize| {
            let (x, y) = (x.min(width / 2 - 1), y.min(height / 2 - 1));
            (f32::from(plane[y * row + x]) - 128.) / 224.
        };
        let other = if y.is_multiple_of(2) { (y / 2).saturating_sub(1) } else { y / 2 + 1 };
        let column = |x: usize| 0.75 * at(x, y / 2) + 0.25 * at(x, other);
        0.5 * (column(x / 2) + column(x.div_ceil(2)))
    };
    let mut rgb = vec![];
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        let luma = (f32::from(yuv.y()[y * row_y + x]) - 16.) / 219.;
        let (cb, cr) = (chroma(yuv.u(), row_u, x, y), chroma(yuv.v(), row_v, x, y));
        let (r, b) = (luma + 1.5748 * cr, luma + 1.8556 * cb);
        let g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152;
        rgb.extend([r, g, b].map(|c| (c * 255.).round().clamp(0., 255.) as u8));
    }
    rgb
}

/// Frames of an MP4 file as RGB, and their size, found through its index.
fn decoded_mp4(file: &[u8]) -> (Vec<Vec<u8>>, (usize, usize)) {
    let boxes = boxes(file);
    let stbl = |name: &str| &boxes[&format!("moov/trak/mdia/minf/stbl/{name}")].1;
    let avcc = stbl("stsd/avc1/avcC");
    let sps = usize::from(u16::from_be_bytes([avcc[6], avcc[7]]));
    let pps = &avcc[8 + sps + 3..];
    let mut stream = vec![[&[0, 0, 0, 1], &avcc[8..8 + sps], &[0, 0, 0, 1], pps].concat()];
    let mut at = u32_at(stbl("stco"), 8) as usize;
    assert_eq!(at, boxes["mdat"].0, "the first chunk is all frames");
    for size in stbl("stsz")[12..].chunks(4) {
        let end = at + u32_at(size, 0) as usize;
        let mut units = vec![];
        while at < end {
            let length = u32_at(file, at) as usize;
            units.extend([&[0, 0, 0, 1], &file[at + 4..at + 4 + length]].concat());
            at += 4 + length;
        }
        assert_eq!(at, end, "units fill the frame");
        stream.push(units);
    }
    assert_eq!(at, file.len(), "frames fill the file");
    let mut decoder = Decoder::new().unwrap();
    let (mut frames, mut size) = (vec![], (0, 0));
    for packet in stream {
        if let Some(yuv) = decoder.decode(&packet).unwrap() {
            size = yuv.dimensions();
            frames.push(rgb(&yuv));
        }
    }
    for yuv in decoder.flush_remaining().unwrap() {
        frames.push(rgb(&yuv));
    }
    (frames, size)
}

#[test]
fn an_mp4_file_decodes_to_the_frames_that_went_in() {
    let dir = tempfile::tempdir().unwrap();
    let given = frames(96, 64, 20);
    let path = write(&dir.path().join("v.mp4"), (96, 64), 8., &given);
    let (found, size) = decoded_mp4(&fs::read(path).unwrap());
    assert_eq!((size, found.len()), ((96, 64), 20));
    for (i, (found, given)) in found.iter().zip(&given).enumerate() {
        let psnr = psnr(found, given);
        assert!(psnr > 38., "frame {i}: {psnr} dB");
    }
}

#[test]
fn an_mp4_file_says_what_it_holds_before_its_frames() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir.path().join("v.mp4"), (96, 64), 23.976, &frames(96, 64, 50));
    let boxes = boxes(&fs::read(path).unwrap());
    let at = |name: &str| boxes[name].0;
    assert!(at("ftyp") < at("moov") && at("moov") < at("mdat"), "the index comes first");
    let body = |name: &str| &boxes[name].1;

    let tkhd = body("moov/trak/tkhd");
    assert_eq!(tkhd[tkhd.len() - 8..], [0, 96, 0, 0, 0, 64, 0, 0]);
    for name in ["moov/mvhd", "moov/trak/mdia/mdhd"] {
        let head = body(name);
        // Times have eight bytes in version 1.
        let (ticks, duration) = match head[0] {
            0 => (u32_at(head, 12), u32_at(head, 16)),
            _ => (u32_at(head, 20), u32_at(head, 28)),
        };
        assert_eq!((ticks, duration), (23976, 50_000), "{name}");
    }
    let stbl = |name: &str| body(&format!("moov/trak/mdia/minf/stbl/{name}"));
    assert_eq!(stbl("stts")[4..], [0, 0, 0, 1, 0, 0, 0, 50, 0, 0, 3, 0xe8]);
    assert_eq!(stbl("stss")[4..], [0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 49], "every two seconds");
    assert_eq!(stbl("stsd/avc1/colr"), b"nclx\0\x01\0\x01\0\x01\0");
}

#[test]
fn an_mp4_file_says_how_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir.path().join("v.mp4"), (32, 32), 8., &frames(32, 32, 1));
    let file = fs::read(path).unwrap();
    let boxes = boxes(&file);
    let body = |name: &str| &boxes[name].1;
    let all = "prompt: a <red> ♥ & more\nseed: 7";
    let comment = body("moov/udta/meta/ilst/©cmt/data");
    assert_eq!(comment, &[b"\0\0\0\x01\0\0\0\0", all.as_bytes()].concat());

    let keys = body("moov/meta/keys");
    assert_eq!(keys, b"\0\0\0\0\0\0\0\x02\0\0\0\x0emdtaprompt\0\0\0\x0cmdtaseed");
    let values = body("moov/meta/ilst");
    assert!(values.starts_with(b"\0\0\0\x2a\0\0\0\x01\0\0\0\x22data\0\0\0\x01\0\0\0\0a <red> "));
    assert!(values.ends_with(b"\0\0\0\x02\0\0\0\x11data\0\0\0\x01\0\0\0\x007"));

    let mut video = Video::create(&dir.path().join("bare.mp4"), 32, 32, 8., &[]).unwrap();
    video.frame(&frames(32, 32, 1)[0]).unwrap();
    let bare = self::boxes(&fs::read(video.finish().unwrap()).unwrap());
    assert!(!bare.contains_key("moov/meta") && !bare.contains_key("moov/udta"));
}

#[test]
fn noise_is_more_than_a_frame_holds_at_first_and_kept_coarser() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut given: Vec<Vec<u8>> = frames(320, 240, 3);
    given.insert(1, (0..320 * 240 * 3).map(|_| noise()).collect());
    let path = write(&dir.path().join("v.mp4"), (320, 240), 8., &given);
    let file = fs::read(path).unwrap();
    assert_eq!(boxes(&file)["moov/trak/mdia/minf/stbl/stss"].1[8..], [0, 0, 0, 1, 0, 0, 0, 2]);
    let (found, _) = decoded_mp4(&file);
    assert_eq!(found.len(), 4);
    assert!(psnr(&found[0], &given[0]) > 38. && psnr(&found[3], &given[3]) > 32.);
}

#[test]
fn a_gif_file_holds_all_frames_in_time_and_loops() {
    let dir = tempfile::tempdir().unwrap();
    let given = frames(48, 40, 16);
    let path = write(&dir.path().join("v.gif"), (48, 40), 8., &given);
    let mut options = ::gif::DecodeOptions::new();
    options.set_color_output(::gif::ColorOutput::RGBA);
    let file = fs::read(&path).unwrap();
    let mut decoder = options.read_info(&file[..]).unwrap();
    assert_eq!((decoder.width(), decoder.height()), (48, 40));
    assert_eq!(decoder.repeat(), ::gif::Repeat::Infinite);
    let mut delays = vec![];
    while let Some(frame) = decoder.read_next_frame().unwrap() {
        let rgb: Vec<u8> = frame.buffer.chunks(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
        let psnr = psnr(&rgb, &given[delays.len()]);
        assert!(psnr > 30., "frame {}: {psnr} dB", delays.len());
        delays.push(frame.delay);
    }
    assert_eq!((delays.len(), delays.iter().sum::<u16>()), (16, 200), "two seconds");
    assert!(delays.iter().all(|delay| [12, 13].contains(delay)), "{delays:?}");
    let comment = "prompt: a <red> ♥ & more\nseed: 7".as_bytes();
    let block = [&[0x21, 0xfe, comment.len() as u8], comment, &[0]].concat();
    assert!(file.windows(block.len()).any(|window| window == block));
}

#[test]
fn few_colours_stay_what_they_are_in_a_gif_file() {
    let dir = tempfile::tempdir().unwrap();
    let given: Vec<u8> = (0..=255).flat_map(|i| [i, 255 - i, i / 2]).collect();
    let path = write(&dir.path().join("v.gif"), (16, 16), 8., std::slice::from_ref(&given));
    let mut options = ::gif::DecodeOptions::new();
    options.set_color_output(::gif::ColorOutput::RGBA);
    let mut decoder = options.read_info(BufReader::new(fs::File::open(path).unwrap())).unwrap();
    let frame = decoder.read_next_frame().unwrap().unwrap();
    let rgb: Vec<u8> = frame.buffer.chunks(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    assert_eq!(rgb, given);
}

#[test]
fn a_webp_file_holds_all_frames_in_time_and_loops() {
    let dir = tempfile::tempdir().unwrap();
    // An odd number of bytes a frame now and then, and odd sizes.
    let given = frames(49, 41, 12);
    let path = write(&dir.path().join("v.webp"), (49, 41), 12., &given);
    let reader = BufReader::new(fs::File::open(&path).unwrap());
    let mut decoder = image_webp::WebPDecoder::new(reader).unwrap();
    assert_eq!((decoder.dimensions(), decoder.num_frames()), ((49, 41), 12));
    assert_eq!(decoder.loop_count(), image_webp::LoopCount::Forever);
    assert!(decoder.is_lossy() && !decoder.has_alpha());
    let mut millis = 0;
    let mut rgb = vec![0; 49 * 41 * 3];
    for (i, given) in given.iter().enumerate() {
        let delay = decoder.read_frame(&mut rgb).unwrap();
        assert!((83..=84).contains(&delay), "{delay}");
        millis += delay;
        let psnr = psnr(&rgb, given);
        assert!(psnr > 36., "frame {i}: {psnr} dB");
    }
    assert_eq!(millis, 1000);
    let xmp = String::from_utf8(decoder.xmp_metadata().unwrap().unwrap()).unwrap();
    assert!(xmp.contains(">prompt: a &lt;red&gt; ♥ &amp; more&#10;seed: 7<"), "{xmp}");
    let length = fs::metadata(&path).unwrap().len();
    assert_eq!(fs::read(&path).unwrap()[4..8], (length as u32 - 8).to_le_bytes());
}

#[test]
fn a_folder_of_frames_holds_them_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let given = frames(5, 3, 3);
    let path = write(&dir.path().join("v.png"), (5, 3), 7.5, &given);
    assert_eq!(path, dir.path().join("v"));
    assert_eq!(listed(&path), ["00000.png", "00001.png", "00002.png"]);
    for (name, given) in listed(&path).iter().zip(&given) {
        let file = BufReader::new(fs::File::open(path.join(name)).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut rgb = vec![0; given.len()];
        reader.next_frame(&mut rgb).unwrap();
        assert_eq!(&rgb, given, "{name}");
        let text = |i: usize| {
            let chunk = &reader.info().utf8_text[i];
            (chunk.keyword.clone(), chunk.get_text().unwrap())
        };
        assert_eq!(text(0), ("prompt".into(), "a <red> ♥ & more".into()));
        assert_eq!(text(2), ("fps".into(), "7.5".into()));
    }
}

#[test]
fn what_was_there_stays_until_a_video_is_complete() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join(name);
        let old = write(&out, (16, 16), 8., &frames(16, 16, 1));
        let before = bytes(&old);
        let begin = || {
            let mut video = Video::create(&out, 32, 32, 8., &[]).unwrap();
            video.frame(&frames(32, 32, 1)[0]).unwrap();
            video
        };
        // As a process that is killed: nothing is cleaned up.
        std::mem::forget(begin());
        assert_eq!(bytes(&old), before, "{name}");
        let left: Vec<_> = listed(dir.path()).into_iter().filter(|n| n.starts_with(".")).collect();
        let is_ours = |n: &String| n.starts_with(".mmgp-") && n.ends_with(".tmp");
        assert!(left.len() <= 1 && left.iter().all(is_ours), "{name}: {left:?}");

        drop(begin());
        assert_eq!(bytes(&old), before, "{name}");
        assert_eq!(listed(dir.path()).len(), left.len() + 1, "{name}: something is left");

        assert_eq!(begin().finish().unwrap(), old);
        assert_ne!(bytes(&old), before, "{name}");
        assert_eq!(listed(dir.path()).len(), left.len() + 1, "{name}: something is left");
    }
}

#[test]
fn the_same_frames_make_the_same_bytes() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join(name);
        let given = frames(80, 48, 10);
        let first = bytes(&write(&out, (80, 48), 8., &given));
        assert!(first == bytes(&write(&out, (80, 48), 8., &given)), "{name}");
    }
}

#[test]
fn videos_are_numbered_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let one = |names: &mut Names| {
        let mut video = names.video(16, 16, 8., &[]).unwrap();
        video.frame(&frames(16, 16, 1)[0]).unwrap();
        let path = video.finish().unwrap();
        path.file_name().unwrap().to_str().unwrap().to_string()
    };
    let mut names = Names::at(dir.path(), "A dog!", Medium::Video).unwrap();
    assert_eq!([one(&mut names), one(&mut names)], ["a-dog.mp4", "a-dog-2.mp4"]);
    for (name, expected) in [("v.gif", ["v.gif", "v-2.gif"]), ("v.png", ["v", "v-2"])] {
        let mut names = Names::at(&dir.path().join(name), "x", Medium::Video).unwrap();
        assert_eq!([one(&mut names), one(&mut names)], expected);
        // The second run replaces what it names, and leaves the rest alone.
        let third = name.replace('v', "v-3").replace(".png", "");
        let mut names = Names::at(&dir.path().join(name), "x", Medium::Video).unwrap();
        assert_eq!([one(&mut names), one(&mut names)], [expected[0], &third]);
    }
    assert_eq!(listed(dir.path()).len(), 8);
}

#[test]
fn a_folder_with_other_things_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("v.png");
    let folder = write(&out, (16, 16), 8., &frames(16, 16, 1));
    let begin = || Video::create(&out, 16, 16, 8., &[]);
    let mut begun = begin().unwrap();
    begun.frame(&frames(16, 16, 1)[0]).unwrap();
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    for error in [begin().unwrap_err(), begun.finish().unwrap_err()] {
        assert!(error.to_string().contains("other things than frames"), "{error}");
    }
    assert_eq!(listed(&folder), ["00000.png", "notes.txt"]);
    fs::remove_dir_all(&folder).unwrap();
    fs::write(&folder, "a file").unwrap();
    assert!(begin().is_err());
    assert_eq!(listed(dir.path()), ["v"]);
}

#[test]
fn small_and_odd_sizes_are_held() {
    let dir = tempfile::tempdir().unwrap();
    for (width, height) in [(1, 1), (3, 2), (16, 16), (17, 33), (640, 19)] {
        let is_small = |name: &&str| *name == "v.mp4" && width.min(height) < 16;
        for name in NAMES.into_iter().filter(|name| !is_small(name)) {
            let given = frames(width, height, 3);
            let path = write(&dir.path().join(name), (width, height), 8., &given);
            if name == "v.mp4" {
                let (found, size) = decoded_mp4(&fs::read(path).unwrap());
                let even = (width.next_multiple_of(2), height.next_multiple_of(2));
                assert_eq!((size, found.len()), (even, 3), "{width} by {height}");
            }
        }
    }
}

#[test]
fn what_a_format_cannot_hold_is_an_error_before_the_first_frame() {
    let dir = tempfile::tempdir().unwrap();
    let fail = |name: &str, width, height, fps| {
        let path = dir.path().join(name);
        let error = Video::create(&path, width, height, fps, &[]).unwrap_err().to_string();
        assert!(error.starts_with(dir.path().to_str().unwrap()), "{error}");
        error
    };
    for name in NAMES {
        for fps in [0., -1., f64::NAN, f64::INFINITY, 1001.] {
            assert!(fail(name, 16, 16, fps).contains("frames a second"));
        }
        assert!(fail(name, 0, 16, 8.).contains("0 by 16"));
        assert!(fail(&format!("none/{name}"), 16, 16, 8.).contains("none"), "no such folder");
        fs::write(dir.path().join("file"), "").unwrap();
        fail(&format!("file/{name}"), 16, 16, 8.);
    }
    assert!(fail("v.mp4", 64, 14, 8.).contains("at least 16 a side"));
    assert!(fail("v.mp4", 3842, 16, 8.).contains("3842 by 16"));
    assert!(fail("v.mp4", 2162, 2162, 8.).contains("3840 by 2160"));
    assert!(fail("v.gif", 65536, 1, 8.).contains("65535"));
    assert!(fail("v.gif", 16, 16, 60.).contains("at most 50"));
    assert!(fail("v.webp", 16384, 1, 8.).contains("16383"));
    assert!(fail("v.avi", 16, 16, 8.).contains(".mp4, .gif, .webp or .png"));
    assert_eq!(listed(dir.path()), ["file"]);
}

#[test]
fn frames_of_another_size_and_no_frames_are_errors() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        let mut video = Video::create(&dir.path().join(name), 16, 16, 8., &[]).unwrap();
        let error = video.frame(&[0; 767]).unwrap_err().to_string();
        assert!(error.contains("frame 0 has 767 bytes of RGB; expected 768"), "{error}");
        assert!(video.finish().unwrap_err().to_string().contains("without frames"));
        assert!(listed(dir.path()).is_empty(), "{name}");
    }
}

#[test]
fn roundings_of_times_never_add_up() {
    for (fps, ticks) in [(8., 100.), (23.976, 100.), (24., 1000.), (50., 100.), (1000., 1000.)] {
        let sum: u64 = (0..1000).map(|i| ticks_of_frame(i, fps, ticks)).sum();
        assert_eq!(sum, (1000. * ticks / fps).round() as u64);
    }
}
