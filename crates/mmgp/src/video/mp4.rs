//! MP4: H.264 by OpenH264, one track, the index first.
//!
//! The index comes before the frames but is known only after them, so frames are kept in a file
//! without a name until the last one.

use std::{
    io::{self, BufReader, BufWriter, Seek, Write},
    path::PathBuf,
};

use ::mp4_atom::{
    Any, Avc1, Avcc, Co64, Codec, Colr, Dinf, Dref, DrefEntry, Encode, FourCC, Ftyp, Hdlr, Header,
    Ilst, IlstData, IlstDataValue, KeyEntry, Keys, Mdhd, Mdia, Meta, Minf, Moov, Mvhd, Stbl, Stco,
    Stsc, StscEntry, Stsd, Stss, Stsz, StszSamples, Stts, SttsEntry, Tkhd, Trak, Udta, Url, Visual,
    Vmhd,
};
use openh264::{
    OpenH264API,
    encoder::{
        BitRate, Complexity, EncodedBitStream, Encoder as H264, EncoderConfig, FrameRate,
        FrameType, IntraFramePeriod, QpRange, RateControlMode, VuiConfig,
    },
    formats::YUVSlices,
};

use super::{Encoder, Head, Written, joined, outside, yuv::Planes};
use crate::names::{nameless_file, temporary_file};

/// The quantizer of all blocks: near what the eye can tell.
const QP: u8 = 18;
/// OpenH264 fails on frames that take more bytes than their planes do, as noise can at [`QP`]. Such a
/// frame begins anew at a coarser one, up to this.
const COARSEST: u8 = 42;
/// Ticks of the track's clock for each frame, so that rates are kept to a thousandth.
const TICKS: u32 = 1000;

pub(super) struct Mp4 {
    path: PathBuf,
    h264: H264,
    qp: u8,
    planes: Planes,
    fps: f64,
    text: Vec<(String, String)>,
    /// Frames as the file will have them: NAL units behind their lengths.
    spool: BufWriter<std::fs::File>,
    sizes: Vec<u32>,
    /// Numbers of key frames, from 1.
    keys: Vec<u32>,
    sps: Vec<u8>,
    pps: Vec<u8>,
}

impl Mp4 {
    pub(super) fn begin(head: &Head<'_>) -> io::Result<Box<dyn Encoder>> {
        let &Head { path, width, height, fps, text } = head;
        let planes = Planes::new(width, height);
        let (long, short) = (planes.size.0.max(planes.size.1), planes.size.0.min(planes.size.1));
        if short < 16 {
            return Err(outside("MP4", head, "at least 16 a side"));
        }
        if long > 3840 || short > 2160 {
            return Err(outside("MP4", head, "at most 3840 by 2160, or 2160 by 3840"));
        }
        Ok(Box::new(Self {
            path: path.into(),
            h264: h264(QP, planes.size, fps)?,
            qp: QP,
            planes,
            fps,
            text: text.iter().map(|(k, v)| ((*k).to_string(), v.clone())).collect(),
            spool: BufWriter::new(nameless_file(path)?),
            sizes: vec![],
            keys: vec![],
            sps: vec![],
            pps: vec![],
        }))
    }

    /// The index, for frames that begin at `offset` of the file.
    fn moov(&self, offset: u64) -> io::Result<Moov> {
        let frames = self.sizes.len() as u32;
        let (width, height) = (self.planes.size.0 as u16, self.planes.size.1 as u16);
        let timescale = (self.fps * f64::from(TICKS)).round().max(1.) as u32;
        let duration = u64::from(frames) * u64::from(TICKS);
        let (stco, co64) = match u32::try_from(offset + self.bytes()) {
            Ok(_) => (Some(Stco { entries: vec![offset as u32] }), None),
            Err(_) => (None, Some(Co64 { entries: vec![offset] })),
        };
        let stbl = Stbl {
            stsd: Stsd {
                codecs: vec![Codec::Avc1(Avc1 {
                    visual: Visual { data_reference_index: 1, width, height, ..Default::default() },
                    avcc: Avcc::new(&self.sps, &self.pps).map_err(io::Error::other)?,
                    // BT.709 in limited range.
                    colr: Some(Colr::new(1, 1, 1, false).map_err(io::Error::other)?),
                    ..Default::default()
                })],
            },
            stts: Stts { entries: vec![SttsEntry { sample_count: frames, sample_delta: TICKS }] },
            stss: Some(Stss { entries: self.keys.clone() }),
            stsc: Stsc {
                entries: vec![StscEntry {
                    first_chunk: 1,
                    samples_per_chunk: frames,
                    sample_description_index: 1,
                }],
            },
            stsz: Stsz { samples: StszSamples::Different { sizes: self.sizes.clone() } },
            stco,
            co64,
            ..Default::default()
        };
        let minf = Minf {
            vmhd: Some(Vmhd::default()),
            // The frames are in this file.
            dinf: Dinf { dref: Dref { entries: vec![DrefEntry::Url(Url::default())] } },
            stbl,
            ..Default::default()
        };
        let trak = Trak {
            tkhd: Tkhd {
                track_id: 1,
                duration,
                enabled: true,
                in_movie: true,
                width: width.into(),
                height: height.into(),
                ..Default::default()
            },
            mdia: Mdia {
                mdhd: Mdhd { timescale, duration, language: "und".into(), ..Default::default() },
                hdlr: Hdlr { handler: FourCC::new(b"vide"), name: "VideoHandler".into() },
                minf,
            },
            ..Default::default()
        };
        Ok(Moov {
            mvhd: Mvhd {
                timescale,
                duration,
                rate: 1.into(),
                volume: 1.into(),
                next_track_id: 2,
                ..Default::default()
            },
            meta: (!self.text.is_empty()).then(|| self.keyed()),
            trak: vec![trak],
            udta: (!self.text.is_empty())
                .then(|| Udta { meta: Some(self.comment()), ..Default::default() }),
            ..Default::default()
        })
    }

    /// Each text under its keyword, for programs.
    fn keyed(&self) -> Meta {
        let mut keys = Keys::default();
        let mut values = Ilst::default();
        for (index, (keyword, text)) in (1u32..).zip(&self.text) {
            let key_namespace = FourCC::new(b"mdta");
            keys.entries.push(KeyEntry { key_namespace, key_value: keyword.clone() });
            let data = IlstData {
                country_indicator: 0,
                language_indicator: 0,
                value: IlstDataValue::Utf8(text.clone()),
            };
            values.mdta.push((index, data));
        }
        let hdlr = Hdlr { handler: FourCC::new(b"mdta"), name: String::new() };
        Meta { hdlr, items: vec![Any::Keys(keys), Any::Ilst(values)] }
    }

    /// All text in the comment of iTunes' list, for players.
    fn comment(&self) -> Meta {
        let pairs: Vec<_> = self.text.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let text = joined(&pairs);
        // © is one byte here.
        let mut comment = vec![];
        let data = text.len() as u32 + 16;
        comment.extend((data + 8).to_be_bytes());
        comment.extend(b"\xa9cmt");
        comment.extend(data.to_be_bytes());
        comment.extend(b"data\0\0\0\x01\0\0\0\0");
        comment.extend(text.as_bytes());
        let hdlr = Hdlr { handler: FourCC::new(b"mdir"), name: String::new() };
        Meta { hdlr, items: vec![Any::Unknown(FourCC::new(b"ilst"), comment)] }
    }

    fn bytes(&self) -> u64 {
        self.sizes.iter().map(|&size| u64::from(size)).sum()
    }
}

impl Encoder for Mp4 {
    fn frame(&mut self, rgb: &[u8]) -> io::Result<()> {
        self.planes.fill(rgb);
        let Planes { size, y, cb, cr, .. } = &self.planes;
        let source = YUVSlices::new((y, cb, cr), *size, (size.0, size.0 / 2, size.0 / 2));
        let stream = loop {
            match self.h264.encode(&source) {
                Ok(stream) => break units(&stream)?,
                Err(_) if self.qp < COARSEST => {
                    self.qp += 6;
                    self.h264 = h264(self.qp, *size, self.fps)?;
                }
                Err(e) => return Err(io::Error::other(e)),
            }
        };
        if stream.is_key {
            self.keys.push(self.sizes.len() as u32 + 1);
        }
        let mut bytes = 0;
        for unit in &stream.units {
            match unit[0] & 31 {
                7 => keep(&mut self.sps, unit)?,
                8 => keep(&mut self.pps, unit)?,
                _ => {
                    self.spool.write_all(&(unit.len() as u32).to_be_bytes())?;
                    self.spool.write_all(unit)?;
                    bytes += unit.len() as u32 + 4;
                }
            }
        }
        self.sizes.push(bytes);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<Written> {
        let mut file = temporary_file(&self.path)?;
        let mut head = vec![];
        let ftyp = Ftyp {
            major_brand: b"isom".into(),
            minor_version: 0x200,
            compatible_brands: vec![b"isom".into(), b"iso2".into(), b"avc1".into(), b"mp41".into()],
        };
        ftyp.encode(&mut head).map_err(io::Error::other)?;
        let mdat = Header { kind: FourCC::new(b"mdat"), size: Some(self.bytes() as usize) };
        let mut mdat_head = vec![];
        mdat.encode(&mut mdat_head).map_err(io::Error::other)?;
        // The index's length decides where frames begin, which may decide its length.
        let mut moov = vec![];
        loop {
            let length = moov.len();
            let offset = head.len() + length + mdat_head.len();
            moov.clear();
            self.moov(offset as u64)?.encode(&mut moov).map_err(io::Error::other)?;
            if moov.len() == length {
                break;
            }
        }
        file.write_all(&[head, moov, mdat_head].concat())?;

        self.spool.flush()?;
        let expected = self.bytes();
        let mut spool = self.spool.into_inner()?;
        spool.rewind()?;
        let copied = io::copy(&mut BufReader::new(spool), &mut file)?;
        if copied != expected {
            return Err(io::Error::other(format!("{copied} bytes of frames; expected {expected}")));
        }
        file.as_file().sync_all()?;
        Ok(Written::File(file))
    }
}

/// An encoder that keeps every frame, at the quantizer `qp` throughout.
fn h264(qp: u8, (width, height): (usize, usize), fps: f64) -> io::Result<H264> {
    // The rate only decides the level that the file claims.
    let rate = (width * height) as f64 * fps * 0.25;
    let config = EncoderConfig::new()
        // Of OpenH264's modes the one that leaves out no frame and does not warn about it; the range
        // leaves it no choice, nor does a change of scene without their detection.
        .rate_control_mode(RateControlMode::Bufferbased)
        .qp(QpRange::new(qp, qp))
        .scene_change_detect(false)
        .bitrate(BitRate::from_bps(rate.clamp(64e3, 200e6) as u32))
        .max_frame_rate(FrameRate::from_hz(fps as f32))
        .intra_frame_period(IntraFramePeriod::from_num_frames((2. * fps).ceil() as u32))
        .complexity(Complexity::High)
        .skip_frames(false)
        .adaptive_quantization(false)
        .background_detection(false)
        .num_threads(1)
        .vui(VuiConfig::bt709());
    H264::with_api_config(OpenH264API::from_source(), config).map_err(io::Error::other)
}

/// A frame's NAL units without their start codes.
struct Units {
    units: Vec<Vec<u8>>,
    is_key: bool,
}

fn units(stream: &EncodedBitStream<'_>) -> io::Result<Units> {
    let is_key = match stream.frame_type() {
        FrameType::IDR => true,
        FrameType::I | FrameType::P => false,
        other => return Err(io::Error::other(format!("OpenH264 made a frame {other:?}"))),
    };
    let mut units = vec![];
    for layer in (0..stream.num_layers()).filter_map(|i| stream.layer(i)) {
        for unit in (0..layer.nal_count()).filter_map(|i| layer.nal_unit(i)) {
            match unit {
                [0, 0, 0, 1, unit @ ..] | [0, 0, 1, unit @ ..] if !unit.is_empty() => {
                    units.push(unit.to_vec());
                }
                _ => {
                    return Err(io::Error::other("OpenH264 made a NAL unit without a start code"));
                }
            }
        }
    }
    Ok(Units { units, is_key })
}

/// Parameter sets are those of the first frame; the index has room for no others.
fn keep(set: &mut Vec<u8>, unit: &[u8]) -> io::Result<()> {
    if set.is_empty() {
        set.extend(unit);
    }
    if set != unit {
        return Err(io::Error::other("OpenH264 changed a parameter set"));
    }
    Ok(())
}
