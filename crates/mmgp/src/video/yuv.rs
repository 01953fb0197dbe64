//! RGB to planes of Y'CbCr, 4:2:0, BT.709 in limited range (ITU-R BT.709-6, 3.2 to 3.5), with chroma
//! samples where H.264 has them by default: at the left of each pair of columns, midway between two
//! rows (ITU-T H.264, figure 6-1).

/// Three planes for frames of one size, filled again and again.
pub(super) struct Planes {
    /// Of the frames that come in.
    width: usize,
    height: usize,
    /// Of the planes: even.
    pub(super) size: (usize, usize),
    pub(super) y: Vec<u8>,
    pub(super) cb: Vec<u8>,
    pub(super) cr: Vec<u8>,
    /// Cb and Cr of two rows' sums.
    sums: Vec<[f32; 2]>,
}

impl Planes {
    /// Odd sizes gain a copy of their last column or row.
    pub(super) fn new(width: usize, height: usize) -> Self {
        let size = (width.next_multiple_of(2), height.next_multiple_of(2));
        let chroma = size.0 / 2 * (size.1 / 2);
        Self {
            width,
            height,
            size,
            y: vec![0; size.0 * size.1],
            cb: vec![0; chroma],
            cr: vec![0; chroma],
            sums: vec![[0.; 2]; size.0],
        }
    }

    pub(super) fn fill(&mut self, rgb: &[u8]) {
        let (width, height) = self.size;
        for pair in 0..height / 2 {
            self.sums.fill([0.; 2]);
            for row in [pair * 2, pair * 2 + 1] {
                let from = row.min(self.height - 1) * self.width * 3;
                let (pixels, _) = rgb[from..from + self.width * 3].as_chunks::<3>();
                let last = pixels[self.width - 1];
                let padded = pixels.iter().copied().chain(std::iter::repeat(last));
                let to = self.y[row * width..(row + 1) * width].iter_mut();
                for ((pixel, y), sum) in padded.zip(to).zip(&mut self.sums) {
                    let [luma, cb, cr] = ycbcr(pixel);
                    *y = luma.round() as u8;
                    sum[0] += cb;
                    sum[1] += cr;
                }
            }
            for x in 0..width / 2 {
                let (left, at, right) =
                    (self.sums[(2 * x).saturating_sub(1)], self.sums[2 * x], self.sums[2 * x + 1]);
                let mean = |c: usize| ((left[c] + 2. * at[c] + right[c]) / 8.).round() as u8;
                self.cb[pair * (width / 2) + x] = mean(0);
                self.cr[pair * (width / 2) + x] = mean(1);
            }
        }
    }
}

/// Y' in 16 to 235, Cb and Cr in 16 to 240.
fn ycbcr([r, g, b]: [u8; 3]) -> [f32; 3] {
    let [r, g, b] = [r, g, b].map(f32::from);
    let y = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    [
        16. + y * (219. / 255.),
        128. + (b - y) * (224. / 255. / 1.8556),
        128. + (r - y) * (224. / 255. / 1.5748),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rgb: &[u8], width: usize, height: usize) -> Planes {
        let mut planes = Planes::new(width, height);
        planes.fill(rgb);
        planes
    }

    // The 100% colour bars of ITU-R BT.709 at eight bits.
    #[test]
    fn colour_bars_are_those_of_bt_709() {
        for (rgb, expected) in [
            ([255, 255, 255], (235, 128, 128)),
            ([255, 255, 0], (219, 16, 138)),
            ([0, 255, 255], (188, 154, 16)),
            ([0, 255, 0], (173, 42, 26)),
            ([255, 0, 255], (78, 214, 230)),
            ([255, 0, 0], (63, 102, 240)),
            ([0, 0, 255], (32, 240, 118)),
            ([0, 0, 0], (16, 128, 128)),
        ] {
            let planes = of(&rgb.repeat(4), 2, 2);
            assert_eq!((planes.y[0], planes.cb[0], planes.cr[0]), expected, "{rgb:?}");
        }
    }

    #[test]
    fn odd_sizes_repeat_their_last_column_and_row() {
        let rgb: Vec<u8> = (0..27).map(|i| i * 9).collect();
        let planes = of(&rgb, 3, 3);
        assert_eq!(planes.size, (4, 4));
        for i in 0..4 {
            assert_eq!(planes.y[i * 4 + 3], planes.y[i * 4 + 2]);
            assert_eq!(planes.y[12 + i], planes.y[8 + i]);
        }
    }

    #[test]
    fn chroma_is_weighted_around_the_left_column() {
        // Blue in one column of four.
        let at = |column: usize| {
            let row: Vec<u8> = (0..4).flat_map(|x| [0, 0, u8::from(x == column) * 255]).collect();
            let cb = of(&row.repeat(2), 4, 2).cb;
            [f32::from(cb[0]) - 128., f32::from(cb[1]) - 128.]
        };
        for (column, weights) in
            [[0.75, 0.], [0.25, 0.25], [0., 0.5], [0., 0.25]].iter().enumerate()
        {
            let found = at(column).map(|cb| cb / 112.);
            for (found, weight) in found.iter().zip(weights) {
                assert!((found - weight).abs() < 0.01, "column {column}: {found} is not {weight}");
            }
        }
    }
}
