//! The kernels' self-test passes on the GPU that it runs on, with event tracking and without, as the pager has
//! it. These tests fail where no CUDA device can be opened.

use candle_core::CudaDevice;
use mmgp_quant::{Card, fp8_multiplies, kernel_images, self_test, self_test_fp8};

#[test]
fn cuda_kernels_equal_their_twins() {
    let card = Card::of(0).expect("this test needs a CUDA device");
    assert!(!card.name.is_empty());
    let device = CudaDevice::new_with_stream(0).unwrap();
    self_test(&device).unwrap();
    if fp8_multiplies(&device).unwrap() {
        self_test_fp8(&device).unwrap();
    }
    // SAFETY: one stream only.
    unsafe { device.disable_event_tracking() };
    self_test(&device).unwrap();
    if fp8_multiplies(&device).unwrap() {
        self_test_fp8(&device).unwrap();
    }
}

#[test]
fn cuda_cards_that_do_not_exist_are_errors() {
    assert!(Card::of(4096).is_err());
}

#[test]
fn cuda_images_are_fat_binaries() {
    // Their magic number; the driver finds the code for the card in each.
    let [int8, w8a8, _] = kernel_images();
    for image in [int8, w8a8] {
        assert_eq!(image[..4], 0xba55_ed50u32.to_le_bytes());
    }
}
